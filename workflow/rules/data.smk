# From a task's raw data to who holds which example.


def own_files(wildcards):
    """Return the reader's own files that a task reads: when they change, everything after them is made again."""
    return [str(path) for path in task_of(wildcards.task).files()]


rule prepare:
    input:
        own_files,
    output:
        examples=EXAMPLES,
        description=DESCRIPTION,
    log:
        f"{RESULTS}/logs/prepare/{{task}}.log",
    conda:
        "../../environment.yml"
    threads: 1
    params:
        depends_on=lambda wildcards: prepare_depends_on(wildcards.task),
    message:
        "Preparing task {wildcards.task}"
    shell:
        "{FEDLM} prepare --config {STUDY_FILE:q} --task {wildcards.task} 2>&1 | tee {log}"


rule partition:
    input:
        examples=EXAMPLES,
        description=DESCRIPTION,
    output:
        PARTITION,
    log:
        f"{RESULTS}/logs/partition/{{task}}/{{partition}}/seed{{seed}}.log",
    conda:
        "../../environment.yml"
    threads: 1
    params:
        depends_on=lambda wildcards: partition_depends_on(
            wildcards.task, wildcards.partition
        ),
    message:
        "Dividing {wildcards.task} by {wildcards.partition}, seed {wildcards.seed}"
    shell:
        "{FEDLM} partition --config {STUDY_FILE:q} --task {wildcards.task}"
        " --partition {wildcards.partition} --seed {wildcards.seed} 2>&1 | tee {log}"
