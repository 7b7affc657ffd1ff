# The runs: one job each, or several in one process where the study sets pipeline.runs_per_job, since
# starting Python with PyTorch takes longer than a tiny run.


if study.pipeline.runs_per_job == 1:

    rule train:
        input:
            examples=EXAMPLES,
            description=DESCRIPTION,
            partition=PARTITION,
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
            " --method {wildcards.method} --seed {wildcards.seed} --output {output} 2>&1 | tee {log}"

else:

    for number, bundle in enumerate(bundles(RUNS, study.pipeline.runs_per_job)):

        rule:
            name:
                f"train_{number}"
            input:
                examples=EXAMPLES.format(task=bundle[0].task),
                description=DESCRIPTION.format(task=bundle[0].task),
                partitions=sorted({PARTITION.format(**run._asdict()) for run in bundle}),
                predictions=predictions,
            output:
                [RECORD.format(**run._asdict()) for run in bundle],
            log:
                f"{RESULTS}/logs/train/bundle{number}.log",
            conda:
                "../../environment.yml"
            threads: study.pipeline.threads
            resources:
                mem_mb=lambda wildcards, input, attempt, bundle=bundle: memory_mb(
                    bundle[0].task, bundle[0].method, input.predictions, attempt
                ),
                runtime=study.pipeline.minutes,
                gpu=study.pipeline.gpus,
            params:
                study=STUDY_FILE,
                runs=[run.path for run in bundle],
                depends_on=lambda wildcards, bundle=bundle: [
                    run_depends_on(*run[:3]) for run in bundle
                ],
            message:
                f"Training {bundle[0].method} on {bundle[0].task}: {len(bundle)} runs in one process"
            shell:
                "python3 -m fedlm run-many --config {params.study:q} {params.runs} 2>&1 | tee {log}"
