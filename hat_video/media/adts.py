"""AAC as transport streams have it, with a header in each packet, and as everything else has it, with one for all.

Source: ISO/IEC 14496-3, 1.A.2.2.1 (adts_fixed_header) and 1.6.2.1 (AudioSpecificConfig).
"""

from __future__ import annotations

__all__ = ["AAC_RATES", "has_header", "header_for", "without_header"]

AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
"""Samples a second, by samplingFrequencyIndex (table 1.18)."""

_LOW_COMPLEXITY = 2


def has_header(packet: bytes) -> bool:
    """Whether a packet begins with an ADTS header."""
    return len(packet) > 7 and packet[0] == 0xFF and packet[1] & 0xF6 == 0xF0


def header_for(packet: bytes | None, rate: int, channels: int) -> bytes:
    """The AudioSpecificConfig, as MP4 and Matroska want it.

    Args:
        packet: with its ADTS header; None if there is none yet: then plain AAC-LC is taken to be meant.
        rate: samples a second, for that case, as `channels`.
    """
    if packet is not None and has_header(packet):
        kind, place = (packet[2] >> 6) + 1, packet[2] >> 2 & 15
        count = (packet[2] & 1) << 2 | packet[3] >> 6
    else:
        kind, place, count = _LOW_COMPLEXITY, AAC_RATES.index(rate) if rate in AAC_RATES else 3, channels
    return (kind << 11 | place << 7 | count << 3).to_bytes(2, "big")


def without_header(packet: bytes) -> bytes:
    """The packet's own bytes: 7, or with a checksum 9, less."""
    return packet[7 if packet[1] & 1 else 9 :] if has_header(packet) else packet
