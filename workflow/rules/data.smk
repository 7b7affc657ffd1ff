# From a task's raw data to who holds which example.


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
        study=STUDY_FILE,
        depends_on=lambda wildcards: prepare_depends_on(wildcards.task),
    message:
        "Preparing task {wildcards.task}"
    shell:
        "python3 -m fedlm prepare --config {params.study:q} --task {wildcards.task} 2>&1 | lines {log}"


rule partition:
    input:
        examples=EXAMPLES,
        description=DESCRIPTION,
    output:
        update(PARTITION),  # what is there keeps its last digits (`running.partition`)
    log:
        f"{RESULTS}/logs/partition/{{task}}/{{partition}}/seed{{seed}}.log",
    conda:
        "../../environment.yml"
    threads: 1
    params:
        study=STUDY_FILE,
        depends_on=lambda wildcards: partition_depends_on(
            wildcards.task, wildcards.partition
        ),
    message:
        "Dividing {wildcards.task} by {wildcards.partition}, seed {wildcards.seed}"
    shell:
        "python3 -m fedlm partition --config {params.study:q} --task {wildcards.task}"
        " --partition {wildcards.partition} --seed {wildcards.seed} 2>&1 | lines {log}"
