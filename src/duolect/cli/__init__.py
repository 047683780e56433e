"""The command line: one file per group of commands, each importing what is heavy only when it runs."""

from __future__ import annotations

import os
import sys

ABOUT = (
    "Speech to text with an acoustic model and a language model. `duolect <command> --help` says more, `duolect --version` "
    "what this is; DUOLECT_DEBUG=1 shows tracebacks."
)


def main() -> None:
    """Runs `duolect <command> ...`. Exit code 0: all done; 1: some of it failed, as listed; 2: nothing could be done, as said."""
    # Bars and notes of transformers would tear our own progress line apart; it asks for these when it is first imported.
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", **os.environ}
    import tyro

    from duolect.cli import (
        evaluation,
        explaining,
        guarding,
        language,
        maintenance,
        preparation,
        prior,
        recognition,
        report,
        study,
        training,
    )

    commands = {
        "transcribe": recognition.transcribe,
        "decode": recognition.decode,
        "rescore": recognition.rescore,
        "guard": guarding.guard,
        "compare": recognition.compare,
        "tune": evaluation.tune,
        "score": evaluation.score,
        "explain": explaining.explain,
        "report": report.report,
        "prepare": preparation.prepare,
        "units": preparation.units,
        "synthesize": preparation.synthesize,
        "train": training.train,
        "study": study.study,
        "fusion": study.fusion,
        "lm finetune": language.finetune,
        "lm train": language.train,
        "lm text": language.text,
        "lm ppl": language.ppl,
        "prior": prior.prior,
        "models": maintenance.models,
        "doctor": maintenance.doctor,
    }
    words, prog = sys.argv[1:], "duolect"
    if words == ["--version"]:
        from duolect.run import source

        print(f"duolect {source()}")
        sys.exit(0)
    if words[:1] == ["lm"]:
        words, prog = words[1:], "duolect lm"
        commands = {name.removeprefix("lm "): command for name, command in commands.items() if name.startswith("lm ")}
    words = words or ["--help"]
    try:
        code = tyro.extras.subcommand_cli_from_dict(commands, prog=prog, description=ABOUT, sort_subcommands=False, args=words)
    except KeyboardInterrupt:
        to_files = words[:1] == ["transcribe"] and any(word.split("=")[0] == "--out" for word in words)
        resuming = {"decode", "rescore", "compare", "prepare", "train", "study", "fusion", "finetune", "synthesize"}
        goes_on = to_files or not resuming.isdisjoint(words[:1])
        print("\nduolect: stopped" + "; the same command continues what was not finished" * goes_on, file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = 141
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("DUOLECT_DEBUG"):
            raise
        print(f"duolect: {_in_a_line(error)}", file=sys.stderr)
        code = 2
    sys.exit(code or 0)


def _in_a_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}: check the path and its rights"
    return " ".join(str(error).split()) or type(error).__name__
