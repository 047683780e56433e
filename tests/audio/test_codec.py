from __future__ import annotations

import io
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
import soundfile

from duolect.audio.codec import FORMATS, Codec, encode_audio, is_encoded
from duolect.audio.io import read_audio


def chirp(samples: int) -> np.ndarray:
    return (0.3 * np.sin(2e-5 * np.arange(samples) ** 2) * np.hanning(samples)).astype(np.float32)


@pytest.mark.parametrize("codec", get_args(Codec))
def test_encoded_is_heard_again(codec: Codec) -> None:
    samples = chirp(40_000)
    data = encode_audio(samples, codec=codec)
    again = read_audio(data)
    assert len(again) == len(samples)
    assert np.corrcoef(samples, again)[0, 1] > 0.98  # no delay either
    assert [name for name in FORMATS if is_encoded(data, codec=name)] == [codec]
    assert encode_audio(samples, codec=codec) == data
    info = soundfile.info(io.BytesIO(data))
    assert (info.samplerate, info.channels, info.subtype) == (16000, 1, FORMATS[codec].subtype)


def test_the_same_bytes_in_another_process() -> None:
    code = (
        "import sys, hashlib; from tests.audio.test_codec import chirp; from duolect.audio.codec import encode_audio;"
        "print(hashlib.sha256(b''.join(encode_audio(chirp(9000), codec=c) for c in ('ogg', 'opus', 'flac'))).hexdigest())"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("codec", get_args(Codec))
@pytest.mark.parametrize("samples", [1, 160, 3_000_000])
def test_lengths(codec: Codec, samples: int) -> None:
    if codec == "opus" and samples > 10**6:
        samples = 200_000  # ten times slower than the others
    assert len(read_audio(encode_audio(chirp(samples), codec=codec))) == samples


def test_what_is_not_encoded() -> None:
    assert not is_encoded(b"no audio", codec="ogg") and not is_encoded(b"", codec="flac")
    for rate, channels in ((8000, 1), (16000, 2)):
        file = io.BytesIO()
        soundfile.write(file, np.zeros((rate, channels)), rate, format="FLAC")
        assert not is_encoded(file.getvalue(), codec="flac")
