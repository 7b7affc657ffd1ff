# The pipeline: prepare -> partition -> train -> collect -> tables, figures, explorer -> report.
#
#   snakemake                                     runs config/demo.yaml
#   snakemake --configfile config/paper.yaml      runs another study
#   snakemake --report report.html                one page with all tables and figures
#   snakemake --workflow-profile workflow/profiles/slurm ...      on a cluster: see docs/slurm.md


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/results.smk"
include: "workflow/rules/costs.smk"


report: "workflow/report/workflow.rst"


localrules:
    all,
    prepare,
    partition,
    choose,
    collect,
    tables,
    pages,
    figures,
    explorer,
    predict,


# The records are listed too: once tables exist without a failed run, only this makes Snakemake retry it.
rule all:
    default_target: True
    input:
        rules.collect.input,
        rules.tables.output,
        rules.pages.output,
        rules.figures.output,
        rules.explorer.output,
    message:
        "Study {study.study} is complete"


# Only if there are jobs, and not in a dry run.
onstart:
    check_writable()
    show_progress()


onsuccess:
    end_progress()


# If runs failed, tables and figures are made from the others; they name the missing ones.
onerror:
    end_progress()
    draw_finished_runs()
