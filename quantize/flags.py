"""The flags that say how a network is quantized."""

import argparse

from quantize.settings import (
    CODECS,
    HUFFMAN,
    INT8,
    MAX_DROP,
    QUAN_MODES,
    SHORT_MODES,
    TRELLIS,
    CodecSettings,
    QuantizationSettings,
)
from utils import cli


def add_quantization_flags(parser: cli.Parser) -> None:
    group = parser.add_argument_group("quantization")
    group.add_argument("--quan-mode", default="all-quan", choices=(*QUAN_MODES, *SHORT_MODES, INT8),
                       help="which layers share weights; int8: none, all are trained in simulated eight bits")  # fmt: skip
    group.add_argument("--quan-bits", nargs="+", default=["5"], metavar="BITS",
                       help="2^BITS shared weights a layer, 1 to 16; NAME=BITS for single layers")  # fmt: skip
    group.add_argument(
        "--codec",
        default=HUFFMAN,
        choices=CODECS,
        help="huffman: shared weights, fine-tuned; trellis: levels of steps, without training, in a smaller file",
    )
    group.add_argument("--max-bytes", type=cli.positive_int, metavar="N", help="what the file of --codec trellis may take")
    group.add_argument("--max-drop", type=cli.non_negative_float, metavar="POINTS",
                       help="top-1 that --codec trellis may lose on held-out training images "
                       f"(default: {MAX_DROP} without --max-bytes)")  # fmt: skip
    cli.counts_in_training(parser, *cli.names_of(group))
    parser.counts_only("max_bytes", "max_drop", where=lambda args: args.codec == TRELLIS, only="with --codec trellis")
    parser.counts_only("max_drop", where=lambda args: args.max_bytes is None, only="without --max-bytes")
    parser.counts_only("quan_mode", "quan_bits", where=lambda args: args.codec != TRELLIS, only="without --codec trellis")
    parser.counts_only("quan_bits", where=lambda args: args.quan_mode != INT8, only="where weights are shared, not with int8")
    parser.parameters |= {"mode": "quan_mode", "bits": "quan_bits"}


def quantization_settings(args: argparse.Namespace) -> QuantizationSettings:
    """How the flags say that the network is quantized."""
    return QuantizationSettings(args.quan_mode, args.quan_bits)


def codec_settings(args: argparse.Namespace) -> CodecSettings | None:
    """What the second codec may take or lose; None where shared weights are coded."""
    if args.codec != TRELLIS:
        return None
    return CodecSettings(args.max_bytes, MAX_DROP if args.max_drop is None else args.max_drop)
