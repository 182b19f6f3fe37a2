"""Commands as documents write them, and whether their options exist; nothing is run."""

import functools
import importlib
import importlib.util
import re
import shlex

import typer

from lvm.cli import CODEC_JOBS, JOBS

STARTS = ("latent ", "python -m jobs.", "python -m serve.", "python -m tests.", "ray job submit ")


@functools.cache
def options_of(module: str) -> frozenset[str]:
    """Names of the options of a job, "--help" included, as its own --help lists them.

    module: with the command after a space where the job has several.
    """
    app = typer.Typer(add_completion=False)
    name, _, command = module.partition(" ")
    job = importlib.import_module(name)
    app.command()(job.COMMANDS[command] if command else job.main)
    options = [name for p in typer.main.get_command(app).params for name in (*p.opts, *p.secondary_opts)]
    return frozenset({"--help", *(name for name in options if name.startswith("--"))})


def module_of(words: list[str]) -> tuple[str, list[str]]:
    """The module that a `latent` command runs, and its arguments. Raises KeyError on an unknown command."""
    if words[0] == "codec":
        return f"jobs.{CODEC_JOBS[words[1]][0]}", words[2:]
    if words[0] == "concepts":
        return f"jobs.concepts {words[1]}", words[2:]
    if words[0] in ("models", "promote"):
        return f"jobs.models {words[0]}", words[1:]
    if words[0] == "serve":
        return "serve.launch", words[1:]
    if words[0] == "submit":
        return "jobs.submit", words[1:]
    return f"jobs.{JOBS[words[0]][0]}", words[1:]


def unknown_options(command: str) -> list[str]:
    """What is wrong with a command of ours: an option that its job does not have; empty when all exist.

    Raises KeyError on an unknown command, ModuleNotFoundError on an unknown job.
    """
    words = shlex.split(command.rstrip("\\"), comments=True)
    words = [w for w in words if not re.fullmatch(r"[A-Z_]+=.*", w)]  # variables set before it
    if "|" in words:
        words = words[: words.index("|")]
    if words[:3] == ["ray", "job", "submit"]:
        if "--" not in words:  # its own options are Ray's
            return []
        words = words[words.index("--") + 1 :]
    if words[0] == "python":
        module, arguments = words[2], words[3:]
        if module in ("jobs.concepts", "jobs.models"):
            module, arguments = f"{module} {arguments[0]}", arguments[1:]
    else:
        module, arguments = module_of(words[1:])
    wrong: list[str] = []
    if module == "jobs.submit":
        own, rest = split_submit(arguments)
        wrong += [w for w in own if w.startswith("--") and w.split("=")[0] not in options_of(module)]
        if wrong or not rest:
            return wrong
        module, arguments = module_of(rest)
    if module.startswith("tests."):
        return [] if importlib.util.find_spec(module) else [module]
    known = options_of(module)
    return wrong + [w for w in arguments if w.startswith("--") and w.split("=")[0] not in known]


def split_submit(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options of `latent submit` itself, and the command it submits."""
    takes_value = {"--address", "--driver-cpus", "--follow", "--cancel"}
    at = 0
    while at < len(arguments) and arguments[at].startswith("--"):
        at += 2 if arguments[at] in takes_value else 1
    return arguments[:at], arguments[at:]


def commands_in(text: str) -> list[str]:
    """Every command of ours in a document or a file's comments, continued lines joined."""
    joined = re.sub(r"\\\n\s*#?\s*", " ", text)
    found: list[str] = []
    for line in joined.splitlines():
        plain = re.sub(r"^[\s#$>]+", "", line)
        quoted = re.findall(r"`([^`]+)`", line)
        found += [c for c in [plain, *quoted] if re.sub(r"^(?:[A-Z_]+=\S+ )+", "", c).startswith(STARTS)]
    return [c for c in found if not re.search(r"\b(?:NAME|COMMAND)\b", c)]  # what stands for any of them
