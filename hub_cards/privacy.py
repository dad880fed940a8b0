"""What must not get into a card, which is public: paths of a machine, the user names in them, and tokens."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


LOCAL_PATH = "(local path)"
# Tokens of the Hub, GitHub, OpenAI and Anthropic; names in code, such as hf_hub_download, are none.
SECRET = re.compile(r"\b(?:(?:hf_|gh[pousr]_|api_org_)[A-Za-z0-9]{15,}|(?:sk-|github_pat_)[\w-]{15,})")
_PATHS = re.compile(
    r"\bfile://[^\s'\"`]+"
    r"|(?<![\w/.~])/(?!/)[^\s/'\"`|<>]+(?:/[^\s'\"`|]*)?"  # /home/name/x, also behind a colon, but not https://host/x
    r"|(?<![\w/.])(?:\.{1,2}|~[\w.-]*)/[^\s'\"`|]*"  # ./x ../x ~/x ~name/x
    r"|(?<!\w)[A-Za-z]:(?:\\|/(?!/))[^\s'\"`|]*"  # C:\x
    r"|\\\\[\w.-]+\\[^\s'\"`|]*"  # \\host\x
)
# Arguments about a machine or a user, which say nothing about what was trained.
_PRIVATE_ARGUMENTS = re.compile(
    r"secret|password|api_key|(access|auth)_token|^token$|^hub_|_dir$|^run_name$|^(image_folder|push_to_hub|report_to|project)$"
    r"|^(resume_from_checkpoint|trackio_.*|cache_image_features)$"
)
_FILE_SUFFIXES = (".json", ".jsonl", ".parquet", ".zip", ".yaml", ".bin", ".safetensors")


def scrub(text: str) -> str:
    """The text without paths of this machine and without tokens."""
    return _PATHS.sub(LOCAL_PATH, SECRET.sub("(removed)", text))


def scrub_recipe(recipe: str | Mapping) -> str:
    """A recipe as YAML, without comments, paths, and arguments that are about a machine or a user.

    Raises:
        ValueError: if it is no YAML mapping.
    """
    try:
        arguments = yaml.safe_load(recipe) if isinstance(recipe, str) else recipe
    except yaml.YAMLError as error:
        raise ValueError(f"`recipe` cannot be read as YAML: {error}") from error
    if not isinstance(arguments, Mapping):
        raise ValueError(f"`recipe` is {type(arguments).__name__}; allowed is a YAML mapping of arguments.")
    return yaml.safe_dump(_without_private(arguments), sort_keys=False, allow_unicode=True)


def _without_private(value):
    if isinstance(value, Mapping):
        return {
            name: _without_private(each) for name, each in value.items() if not _PRIVATE_ARGUMENTS.search(str(name))
        }
    if isinstance(value, (list, tuple)):
        return [_without_private(each) for each in value]
    # As a whole: a path may have blanks.
    if isinstance(value, str) and (_PATHS.search(value) or ("/" in value and os.path.exists(value))):
        return LOCAL_PATH
    return value


def is_hub_id(name: str) -> bool:
    """Whether a name, also with `@revision`, is OWNER/NAME on the Hub and nothing of this machine."""
    name = name.partition("@")[0]
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not os.path.exists(name) and not name.lower().endswith(_FILE_SUFFIXES)


def is_on_hub(report: Mapping) -> bool:
    """Whether data were loaded from the Hub, by their [`LoadReport`] or [`VQAReport`] as a dictionary.

    A benchmark's report names the publication that it was compared with; local files have another source than that.
    """
    source, reference = report["source"], report.get("reference")
    return is_hub_id(source) and reference in (None, source.partition("@")[0])


__all__ = ["LOCAL_PATH", "SECRET", "is_hub_id", "is_on_hub", "scrub", "scrub_recipe"]
