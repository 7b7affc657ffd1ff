# The runs: one job each, or several in one process where the study sets pipeline.runs_per_job, since
# starting Python with PyTorch takes longer than a tiny run.


RUN, TRIED = (
    "{task}/{partition}/{method}/seed{seed}",
    "{task}/{partition}/{method}/trial{trial}",
)
TUNED = f"{RESULTS}/partitions/{{task}}/{{partition}}/seed{study.tuning.seed if study.tuning else 0}.json"

if study.pipeline.runs_per_job == 1:

    rule train:
        input:
            data=unless_settled(RUN, EXAMPLES, DESCRIPTION, PARTITION),
            choice=lambda wildcards: (
                []
                if RUN.format(**wildcards) in SETTLED
                else choice_of(wildcards.task, wildcards.method)
            ),
            predictions=predictions,
        output:
            RECORD,
        log:
            f"{RESULTS}/logs/train/{{task}}/{{partition}}/{{method}}/seed{{seed}}.log",
        conda:
            "../../environment.yml"
        threads: study.pipeline.threads
        resources:
            mem_mb=lambda wildcards, input, attempt: memory_mb(
                wildcards.task, wildcards.method, input.predictions, attempt
            ),
            runtime=study.pipeline.minutes,
            gpu=study.pipeline.gpus,
        params:
            study=STUDY_FILE,
            depends_on=lambda wildcards: run_depends_on(
                wildcards.task, wildcards.partition, wildcards.method
            ),
        message:
            "Training {wildcards.method} on {wildcards.task}, {wildcards.partition}, seed {wildcards.seed}"
        shell:
            "python3 -m fedlm run --config {params.study:q} --task {wildcards.task} --partition {wildcards.partition}"
            " --method {wildcards.method} --seed {wildcards.seed} --output {output} 2>&1 | lines {log}"

    rule trial:
        input:
            data=unless_settled(
                TRIED,
                EXAMPLES,
                DESCRIPTION,
                *([TUNED] if study.tuning else []),
            ),
            predictions=predictions,
        output:
            TRIAL,
        log:
            f"{RESULTS}/logs/train/{{task}}/{{partition}}/{{method}}/trial{{trial}}.log",
        conda:
            "../../environment.yml"
        threads: study.pipeline.threads
        resources:
            mem_mb=lambda wildcards, input, attempt: memory_mb(
                wildcards.task, wildcards.method, input.predictions, attempt
            ),
            runtime=study.pipeline.minutes,
            gpu=study.pipeline.gpus,
        params:
            study=STUDY_FILE,
            run=lambda wildcards: TRIED.format(**wildcards),
            depends_on=lambda wildcards: trial_depends_on(
                wildcards.task,
                wildcards.partition,
                wildcards.method,
                int(wildcards.trial),
            ),
        message:
            "Trying settings of {wildcards.method} on {wildcards.task}, trial {wildcards.trial}"
        shell:
            "python3 -m fedlm run-many --config {params.study:q} {params.run} 2>&1 | lines {log}"

else:

    UNSETTLED = [run for run in RUNS + TRIALS if run.path not in SETTLED]
    for number, bundle in enumerate(bundles(UNSETTLED, study.pipeline.runs_per_job)):

        rule:
            name:
                f"train_{number}"
            input:
                examples=EXAMPLES.format(task=bundle[0].task),
                description=DESCRIPTION.format(task=bundle[0].task),
                partitions=sorted({PARTITION.format(**run._asdict()) for run in bundle}),
                choices=(
                    choice_of(bundle[0].task, bundle[0].method)
                    if bundle[0].trial is None
                    else []
                ),
                predictions=predictions,
            output:
                [record_of(run) for run in bundle],
            log:
                f"{RESULTS}/logs/train/bundle{number}.log",
            priority: -number  # in the order of the study's file, after the data are there
            conda:
                "../../environment.yml"
            threads: study.pipeline.threads
            resources:
                mem_mb=lambda wildcards, input, attempt, bundle=bundle: max(
                    memory_mb(run.task, run.method, input.predictions, attempt)
                    for run in bundle
                ),
                runtime=study.pipeline.minutes,
                gpu=study.pipeline.gpus,
            params:
                study=STUDY_FILE,
                runs=[run.path for run in bundle],
                depends_on=lambda wildcards, bundle=bundle: [
                    depends_on(run) for run in bundle
                ],
            message:
                f"Training {', '.join(dict.fromkeys(run.method for run in bundle))} on {bundle[0].task}: "
                f"{len(bundle)} {'runs' if bundle[0].trial is None else 'trials'} in one process"
            shell:
                "python3 -m fedlm run-many --config {params.study:q} {params.runs} 2>&1 | lines {log}"


# The settings that a study with `tuning` chooses for each method on each task.
rule choose:
    input:
        trials_of,
    output:
        CHOICE,
    log:
        f"{RESULTS}/logs/choose/{{task}}/{{method}}.log",
    conda:
        "../../environment.yml"
    threads: 1
    params:
        study=STUDY_FILE,
        depends_on=sources("fedlm/jobs/tuning.py"),
    message:
        "Choosing the settings of {wildcards.method} on {wildcards.task}"
    shell:
        "python3 -m fedlm choose --config {params.study:q} --task {wildcards.task}"
        " --method {wildcards.method} 2>&1 | lines {log}"
