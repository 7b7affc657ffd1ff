"""The JSON schema of a study file, for editors."""

import json
from typing import Any

from pydantic import TypeAdapter

from fedlm.data.schemes import PartitionConfig
from fedlm.federation.method import MethodConfig
from fedlm.federation.settings import Budget, Federation, ServerOptimizer, Training
from fedlm.models.config import ModelConfig
from fedlm.study import plugins
from fedlm.study.study import LABEL, Pipeline, Tuning


def schema() -> str:
    """Return the JSON schema of a study file, as `config/schema.json` holds it."""
    definitions: dict[str, Any] = {}

    def of(kind: Any) -> dict:
        found = TypeAdapter(kind).json_schema(ref_template="#/$defs/{model}")
        definitions.update(found.pop("$defs", {}))
        return found

    def reference(kind: Any, name: str = "") -> dict:
        name = name or kind.__name__
        definitions[name] = of(kind)
        return {"$ref": f"#/$defs/{name}"}

    def labelled(key: str, kinds: dict, extra: dict, common: dict | None = None) -> dict:
        choices = []
        for name, kind in sorted(kinds.items()):
            entry = of(kind.Config)
            entry["title"] = f"{name}: {kind.title}"
            own = entry.get("properties", {})
            for field in own:
                if common and own[field] == common["properties"].get(field):
                    own[field] = {"$ref": f"#/$defs/{common['title']}/properties/{field}"}
            entry["properties"] = {key: {"const": name}, **extra, **own}
            choices.append(entry)
        return {"anyOf": [{"type": "null"}, *choices]}

    def optional(kind: Any) -> dict:
        return {"anyOf": [{"type": "null"}, reference(kind)]}

    model = {"anyOf": [{"type": "string"}, reference(ModelConfig)]}
    training, federation = optional(Training), optional(Federation)
    label_list = {"type": "array", "items": {"type": "string"}, "minItems": 1}
    task_extra = {"model": model, "partitions": label_list, "federation": federation, "training": training}
    method_extra = {
        "title": {"type": "string"},
        "tasks": label_list,
        "partitions": label_list,
        "training": training,
        "tuned_as": {"type": "string", "description": "row whose trials choose this row's settings too"},
        "server_optimizer": {"anyOf": [{"type": "null"}, reference(ServerOptimizer, "ServerOptimizer")]},
        "budgets": {"type": "array", "items": reference(Budget), "maxItems": 100},
    }
    reference(MethodConfig)
    names = {"pattern": f"^{LABEL.pattern}$"}
    entries = {
        "tasks": labelled("task", plugins.discover_tasks(), task_extra),
        "methods": labelled("method", plugins.discover_methods(), method_extra, definitions["MethodConfig"]),
    }
    tree = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fedlm-bench study",
        "type": "object",
        "additionalProperties": False,
        "required": ["study", "tasks", "partitions", "methods"],
        "properties": {
            "study": {"type": "string", **names},
            "seeds": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            "model": model,
            "federation": federation,
            "training": training,
            "pipeline": optional(Pipeline),
            "tuning": optional(Tuning),
            "plugins": {
                "anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "string", "minLength": 1}}],
                "description": "folders with your own methods and tasks, relative to the study file",
            },
            "tasks": {
                "type": "object",
                "propertyNames": names,
                "minProperties": 1,
            },
            "partitions": {
                "type": "object",
                "propertyNames": names,
                "minProperties": 1,
                "additionalProperties": {
                    "anyOf": [
                        {"type": "null"},
                        of(PartitionConfig),
                        # The label itself may be the scheme.
                        {"type": "object", "not": {"required": ["scheme"]}},
                    ]
                },
            },
            "methods": {
                "type": "object",
                "propertyNames": names,
                "minProperties": 1,
            },
        },
    }
    # The schema cannot know the settings of plug-ins: in a study with plug-ins, an entry may be any table.
    tree["if"] = {"required": ["plugins"]}
    tree["then"] = {
        "properties": {
            key: {"additionalProperties": {"anyOf": [{"$ref": f"#/$defs/{key}"}, {"type": "object"}]}}
            for key in entries
        }
    }
    tree["else"] = {
        "properties": {key: {"additionalProperties": {"$ref": f"#/$defs/{key}"}} for key in entries}
    }
    tree["$defs"] = definitions | entries
    return json.dumps(tree, indent=1, sort_keys=True) + "\n"
