# From the records to what a reader looks at.

TABLES = {
    "main": "Score and costs",
    "aggregate": "Aggregated scores",
    "paired": "Paired comparisons",
    "traffic": "Traffic and time",
    "memory": "Memory",
    "skew": "Skew of the partitions",
    "reference": "Published numbers",
}
PICTURES = ["score_over_rounds"]


rule collect:
    input:
        expand(
            RECORD,
            zip,
            **{key: [getattr(run, key) for run in RUNS] for key in RUNS[0]._fields},
        ),
    output:
        runs=f"{RESULTS}/runs.parquet",
        rounds=f"{RESULTS}/rounds.parquet",
    log:
        f"{RESULTS}/logs/collect.log",
    conda:
        "../../environment.yml"
    params:
        runs=digest([run.path for run in RUNS]),
        depends_on=sources("fedlm/results.py"),
    message:
        f"Collecting {len(RUNS)} records"
    shell:
        "{FEDLM} collect --config {STUDY_FILE:q} 2>&1 | tee {log}"


rule tables:
    input:
        rules.collect.output,
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
        titles={label: entry.title for label, entry in study.methods.items()},
        depends_on=sources(
            "fedlm/tables.py", "fedlm/statistics.py", "config/reference.yaml"
        ),
    message:
        "Making the tables"
    shell:
        "{FEDLM} tables --config {STUDY_FILE:q} 2>&1 | tee {log}"


rule figures:
    input:
        rules.collect.output,
    output:
        expand(
            f"{FIGURES}/{{picture}}.{{format}}",
            picture=PICTURES,
            format=["png", "pdf"],
        ),
    log:
        f"{RESULTS}/logs/figures.log",
    conda:
        "../../environment.yml"
    params:
        titles={label: entry.title for label, entry in study.methods.items()},
        depends_on=sources("fedlm/figures.py"),
    message:
        "Drawing the figures"
    shell:
        "{FEDLM} figures --config {STUDY_FILE:q} 2>&1 | tee {log}"


# Snakemake's report shows pages and pictures, but offers csv and Markdown only for download.
rule pages:
    input:
        expand(f"{RESULTS}/tables/{{table}}.md", table=list(TABLES)),
    output:
        [
            report(
                f"{RESULTS}/pages/{table}.html",
                category="Tables",
                caption=f"../report/{table}.rst",
                labels={"table": title},
            )
            for table, title in TABLES.items()
        ],
    log:
        f"{RESULTS}/logs/pages.log",
    conda:
        "../../environment.yml"
    params:
        depends_on=sources("workflow/scripts/pages.py"),
    message:
        "Turning the tables into pages of the report"
    shell:
        "{PYTHON} {workflow.basedir}/workflow/scripts/pages.py {input} {RESULTS}/pages 2>&1 | tee {log}"
