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
        " || [ -s {output} ] || echo '{{}}' > {output}; }} 2>&1 | lines {log}"


if CONTENTS.judges():

    # The costs on large models that config/claims.yaml names: for the verdicts in the table of claims.
    rule predict_claims:
        output:
            CLAIMED,
        log:
            f"{RESULTS}/logs/predict_claims.log",
        localrule: True
        conda:
            "../../environment.yml"
        threads: 1
        params:
            depends_on=[
                sources("fedlm/costs/claimed.py", "config/claims.yaml"),
                claimed_methods(),
            ],
        message:
            "Predicting the costs that claims name"
        shell:
            "python3 -m fedlm costs --claims {output} 2>&1 | lines {log}"
