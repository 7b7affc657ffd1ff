# From the records to tables, figures and pages.

from fedlm.results.contents import Contents, cells_of, names_of_figures, names_of_tables

CONTENTS = Contents.of(study)
TITLES_OF_TABLES = {
    "main": "Score and costs",
    "ranking": "Ranking",
    "paired": "Paired comparisons",
    "traffic": "Traffic and time",
    "memory": "Memory",
    "skew": "Skew of the partitions",
    "reference": "Published numbers",
    "quality": "Quality control",
    "profiles": "Performance profiles",
    "cost_to_target": "Cost to target",
    "tuning": "Tuning",
    "claims": "Claims",
}
TABLES = {name: TITLES_OF_TABLES[name] for name in names_of_tables(CONTENTS)}
CLAIMED = f"{RESULTS}/costs/claims.csv"
PAGES = Path(workflow.basedir, "workflow", "scripts", "pages.py")
PAGE_PARTS = [
    f"fedlm/results/page/explorer.{ending}" for ending in ("html", "css", "js")
]
PICTURES = names_of_figures(cells_of(study), CONTENTS)


rule collect:
    input:
        [record_of(run) for run in RUNS + TRIALS],
    output:
        **({"trials": f"{RESULTS}/trials.parquet"} if TRIALS else {}),
        runs=f"{RESULTS}/runs.parquet",
        rounds=f"{RESULTS}/rounds.parquet",
    log:
        f"{RESULTS}/logs/collect.log",
    conda:
        "../../environment.yml"
    params:
        study=STUDY_FILE,
        runs=digest([run.path for run in RUNS + TRIALS]),
        depends_on=sources("fedlm/jobs/collecting.py"),
    message:
        f"Collecting {len(RUNS)} records"
    shell:
        "python3 -m fedlm collect --config {params.study:q} 2>&1 | lines {log}"


rule tables:
    input:
        rules.collect.output,
        [CLAIMED] if CONTENTS.judges() else [],
    output:
        expand(
            f"{RESULTS}/tables/{{table}}.{{format}}",
            table=list(TABLES),
            format=["csv", "md", "tex"],
        ),
        f"{RESULTS}/tables/missing.csv",
    log:
        f"{RESULTS}/logs/tables.log",
    conda:
        "../../environment.yml"
    params:
        study=STUDY_FILE,
        titles=study.titles(),
        depends_on=[
            sources(
                "fedlm/results/tables.py",
                "config/reference.yaml",
                "config/devices.yaml",
                "config/claims.yaml",
            ),
            methods_used(),
        ],
    message:
        "Making the tables"
    shell:
        "python3 -m fedlm tables --config {params.study:q} 2>&1 | lines {log}"


rule figures:
    input:
        rules.collect.output,
    output:
        expand(f"{FIGURES}/{{picture}}.pdf", picture=PICTURES),
        [
            report(
                f"{FIGURES}/{picture}.png",
                category="Figures",
                caption=f"../report/figure_{picture.rstrip('_0123456789')}.rst",
                labels={"figure": f"{number}. {picture.replace('_', ' ')}"},
            )
            for number, picture in enumerate(PICTURES, start=1)
        ],
    log:
        f"{RESULTS}/logs/figures.log",
    conda:
        "../../environment.yml"
    params:
        study=STUDY_FILE,
        titles=study.titles(),
        depends_on=[sources("fedlm/results/figures.py"), methods_used()],
    message:
        "Drawing the figures"
    shell:
        "python3 -m fedlm figures --config {params.study:q} 2>&1 | lines {log}"


rule explorer:
    input:
        rules.collect.output,
    output:
        f"{RESULTS}/explorer.html",
    log:
        f"{RESULTS}/logs/explorer.log",
    conda:
        "../../environment.yml"
    params:
        study=STUDY_FILE,
        titles=study.titles(),
        depends_on=[
            sources("fedlm/results/explorer.py", "config/devices.yaml", *PAGE_PARTS),
            methods_used(),
        ],
    message:
        "Making the explorer, a page with all results"
    shell:
        "python3 -m fedlm explorer --config {params.study:q} 2>&1 | lines {log}"


# Snakemake's report displays pages and pictures, but offers csv and Markdown only for download.
rule pages:
    input:
        expand(f"{RESULTS}/tables/{{table}}.md", table=list(TABLES)),
    output:
        [
            report(
                f"{RESULTS}/pages/{table}.html",
                category="Tables",
                caption=f"../report/table_{table}.rst",
                # Numbered, since the report sorts by name.
                labels={"table": f"{number}. {title}"},
            )
            for number, (table, title) in enumerate(TABLES.items(), start=1)
        ],
    log:
        f"{RESULTS}/logs/pages.log",
    conda:
        "../../environment.yml"
    params:
        script=PAGES,
        depends_on=sources("workflow/scripts/pages.py"),
    message:
        "Turning the tables into pages of the report"
    shell:
        "python3 {params.script:q} {input} {output} 2>&1 | lines {log}"
