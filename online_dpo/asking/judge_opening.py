"""Opening a judge: made in this process, or in one of its own where it computes or loads torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo import plugins
from online_dpo.asking.judge_forms import Form, Mode, is_built_in, make_form, mode_of
from online_dpo.asking.judge_worker import JudgeProcess
from online_dpo.asking.verdicts import Kind
from online_dpo.errors import ConfigError
from online_dpo.paid.chat import missing_key


@dataclass(frozen=True)
class OpenJudge:
    """A judge that can be asked: `form` in this process, or `process`, where that is not None.

    `function` says that it is a plain function, which is asked about one response at a time.
    """

    kind: Kind
    mode: Mode
    version: str
    function: bool
    form: Form | None = None
    process: JudgeProcess | None = None


def open_judge(
    name: str,
    options: dict[str, Any],
    base: Path | None,
    *,
    run: Path,
    log: Path,
    env: Mapping[str, str],
) -> OpenJudge:
    """Make the judge that a config names where it runs. Raises ConfigError where that fails.

    `run` is the run directory, which a process of the judge's own keeps from being started anew as
    long as it lives; `env` is that process's environment beside ours.
    """
    if is_built_in(name):
        mode = mode_of(plugins.resolve(name))
        if mode != "worker":
            return _opened(make_form(name, options, base), mode)
    # A user's module is imported in a process of its own first: it may load torch, or hang.
    process = JudgeProcess(name, options, base, run=run, log=log, env=env)
    try:
        found = process.describe()
    except BaseException:
        process.close()
        raise
    if found["mode"] == "worker":
        return OpenJudge(
            found["kind"], "worker", found["version"], found["function"], process=process
        )
    process.close()
    return _opened(make_form(name, options, base), found["mode"])


def check_key(judge: Any) -> None:
    """Ask for an API's key before anything is sampled for it, where a judge says what it needs.

    Raises ConfigError. A server of one's own (`base_url`) may do without.
    """
    name = getattr(judge, "api_key_env", None)
    if name is not None and getattr(judge, "base_url", None) is None and not os.environ.get(name):
        raise ConfigError(missing_key(name))


def _opened(form: Form, mode: Mode) -> OpenJudge:
    return OpenJudge(form.kind, mode, form.version, form.function, form=form)
