"""TensorBoard's event files, as far as scalars need them: records that each hold one protocol buffer.

Written out because tensorboardX imports torch where it is installed (seconds at every start) and hands the
writing to a thread, which on a full disk dies unseen and leaves the training waiting for it.

A record is length (8 bytes), its masked CRC, data, its masked CRC (TensorFlow's lib/io/record_writer.h); the data
is the message Event of TensorFlow's util/event.proto. The names of the fields written are beside each line.
"""

import pathlib
import struct
import time
from collections.abc import Mapping


class EventFile:
  """Appends scalars, without a buffer of its own. Raises OSError where there is no room."""

  def __init__(self, folder: pathlib.Path):
    folder.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads all files of a folder in the order of their names.
    name = f'events.out.tfevents.{time.time_ns()}'
    self.file = open(folder / name, 'xb', buffering=0)  # noqa: SIM115 (open as long as the run lives)
    self.write(0, field(3, b'brain.Event:2'))  # file_version

  def restart(self, step: int) -> None:
    """Tells TensorBoard to forget what other files of the folder have of `step` and later ones."""
    self.write(step, field(7, whole(1, 1)))  # session_log.status = START

  def scalars(self, step: int, values: Mapping[str, int | float]) -> None:
    """Adds {tag: value}."""
    summary = b''
    for tag, value in values.items():
      message = field(1, tag.encode()) + real(2, 'f', float(value))  # tag, simple_value
      summary += field(1, message)  # value
    self.write(step, field(5, summary))  # summary

  def write(self, step: int, content: bytes) -> None:
    """One record with an Event."""
    event = real(1, 'd', time.time()) + whole(2, step) + content  # wall_time, step
    length = struct.pack('<Q', len(event))
    self.file.write(length + masked_crc(length) + event + masked_crc(event))

  def close(self) -> None:
    self.file.close()


def field(number: int, content: bytes) -> bytes:
  """A field of bytes, text or another message."""
  return varint(number << 3 | 2) + varint(len(content)) + content


def whole(number: int, value: int) -> bytes:
  """A field with a whole number."""
  return varint(number << 3) + varint(value)


def real(number: int, kind: str, value: float) -> bytes:
  """A field with a double, kind 'd', or a float, kind 'f'."""
  return varint(number << 3 | (1 if kind == 'd' else 5)) + struct.pack(f'<{kind}', value)


def varint(value: int) -> bytes:
  """Seven bits a byte, the lowest first; the top bit says that more follow."""
  result = bytearray()
  while value > 127:
    result.append(value & 127 | 128)
    value >>= 7
  return bytes([*result, value])


def crc_table() -> list[int]:
  """The 256 remainders of CRC-32C (Castagnoli, reflected polynomial 0x82f63b78)."""
  table = list(range(256))
  for _ in range(8):
    table = [value >> 1 ^ 0x82F63B78 * (value & 1) for value in table]
  return table


TABLE = crc_table()


def masked_crc(data: bytes) -> bytes:
  """CRC-32C of `data`, rotated by 15 bits and shifted by a constant, as the format wants it."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc = TABLE[(crc ^ byte) & 255] ^ crc >> 8
  crc ^= 0xFFFFFFFF
  return struct.pack('<I', ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
