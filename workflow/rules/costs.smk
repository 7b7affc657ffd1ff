# What each method would cost: needs neither data nor weights nor runs.


rule predict:
    output:
        PREDICTIONS,
    log:
        f"{RESULTS}/logs/predict.log",
    conda:
        "../../environment.yml"
    threads: 1
    params:
        study=STUDY_FILE,
        depends_on=digest(
            study.model_dump(mode="json", exclude={"seeds", "partitions", "pipeline"}),
            sources("fedlm/costs/cases.py", "fedlm/costs/prediction.py"),
            methods_used(),
            [
                data_code_hash(study.found.tasks[entry.task])
                for entry in study.tasks.values()
            ],
        ),
    message:
        "Predicting what each method needs"
    # Without a prediction the jobs still run: they request what the study sets.
    shell:
        "{{ python3 -m fedlm costs --config {params.study:q} --predictions {output}"
        " || [ -s {output} ] || echo '{{}}' > {output}; }} 2>&1 | tee {log}"
