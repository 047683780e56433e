"""Audio to bytes in the formats that corpora are stored in."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import soundfile

from duolect.audio.io import SAMPLE_RATE

Codec = Literal["ogg", "opus", "flac"]

BLOCK_SAMPLES = 1 << 16  # libsndfile's Vorbis encoder keeps a block on the stack: a minute at once would overflow it
_REVERSED = bytes(int(f"{i:08b}"[::-1], 2) for i in range(256))


@dataclass(frozen=True)
class Format:
    """How a codec is asked of libsndfile, and what speech takes in it (megabytes per hour, from above: clean read speech takes less)."""

    container: str
    subtype: str
    level: float | None
    suffix: str
    megabytes_per_hour: float


FORMATS: Mapping[Codec, Format] = {
    "ogg": Format("OGG", "VORBIS", 0.7, ".ogg", 21.0),  # quality 3 of -1 .. 10
    "opus": Format("OGG", "OPUS", 0.9, ".opus", 15.0),  # 31 kbit/s
    "flac": Format("FLAC", "PCM_16", None, ".flac", 85.0),
}


def encode_audio(samples: np.ndarray, *, codec: Codec) -> bytes:
    """A file's bytes of samples [N], mono, 16 kHz: the same bytes for the same samples."""
    form, file = FORMATS[codec], io.BytesIO()
    with soundfile.SoundFile(file, "w", SAMPLE_RATE, 1, subtype=form.subtype, format=form.container, compression_level=form.level) as sound:
        for start in range(0, len(samples), BLOCK_SAMPLES):
            sound.write(samples[start : start + BLOCK_SAMPLES])
    return _with_serial(file.getvalue(), 1) if form.container == "OGG" else file.getvalue()


def is_encoded(data: bytes, *, codec: Codec) -> bool:
    """Whether a file's bytes are mono 16 kHz of this codec already, so that encoding them again would only lose quality."""
    try:
        info, form = soundfile.info(io.BytesIO(data)), FORMATS[codec]
    except soundfile.SoundFileError:
        return False
    return (info.format, info.subtype, info.samplerate, info.channels) == (form.container, form.subtype, SAMPLE_RATE, 1)


def _with_serial(ogg: bytes, serial: int) -> bytes:
    """An Ogg file whose pages bear this serial number, where libsndfile draws one at random (RFC 3533, section 6)."""
    pages, at = bytearray(ogg), 0
    while at < len(pages):
        segments = pages[at + 26]
        end = at + 27 + segments + sum(pages[at + 27 : at + 27 + segments])
        pages[at + 14 : at + 18] = serial.to_bytes(4, "little")
        pages[at + 22 : at + 26] = bytes(4)
        # Ogg's checksum is that of zip with every byte's bits the other way round and other ends; in plain Python it would take longer
        # than encoding does.
        mirrored = zlib.crc32(pages[at:end].translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
        pages[at + 22 : at + 26] = int(f"{mirrored:032b}"[::-1], 2).to_bytes(4, "little")
        at = end
    return bytes(pages)
