"""What an encoder is made as: widths and depth, in which the families differ, and how it is computed."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """Everything in which the families differ is data."""

  family: str = 'bert'
  vocab_size: int = 30522
  width: int = 768
  depth: int = 12
  heads: int = 12
  hidden: int = 3072  # feed-forward width
  max_positions: int = 512  # rows of the position table
  type_vocab: int = 2  # 0: the family has no token types
  position_offset: int = 0  # 2 in RoBERTa and MPNet, whose first rows belong to padding
  relative_buckets: int = 0  # 32 in MPNet
  pad_id: int = 0
  norm_eps: float = 1e-12
  activation: str = 'gelu'
  dropout: float = 0.1
  attention_dropout: float = 0.1
  dtype: str = 'float32'  # of the matrix products; parameters, softmax and LayerNorm stay in float32
  kernel: str = 'plain'  # of attention; 'xla', 'cudnn': see `attention.fused`
  # Query, key and value in one product: faster where a matrix unit is hard to fill, slower on a CPU.
  joint: bool = False
  # Slots that half a block, or STTABT's plans, are made of at a time at inference; 0: of all; -1: see `grouping.group_rows`.
  group_slots: int = -1

  @property
  def max_length(self) -> int:
    """The longest input in tokens."""
    return self.max_positions - self.position_offset
