"""The flags that say how a network is quantized."""

import argparse

from quantize.settings import INT8, QUAN_MODES, SHORT_MODES, QuantizationSettings
from utils import cli


def add_quantization_flags(parser: cli.Parser) -> None:
    group = parser.add_argument_group("quantization")
    group.add_argument("--quan-mode", default="all-quan", choices=(*QUAN_MODES, *SHORT_MODES, INT8),
                       help="which layers share weights; int8: none, all are trained in simulated eight bits")  # fmt: skip
    group.add_argument("--quan-bits", nargs="+", default=["5"], metavar="BITS",
                       help="2^BITS shared weights a layer, 1 to 16; NAME=BITS for single layers")  # fmt: skip
    cli.counts_in_training(parser, *cli.names_of(group))
    parser.counts_only("quan_bits", where=lambda args: args.quan_mode != INT8, only="where weights are shared, not with int8")
    parser.parameters |= {"mode": "quan_mode", "bits": "quan_bits"}


def quantization_settings(args: argparse.Namespace) -> QuantizationSettings:
    """How the flags say that the network is quantized."""
    return QuantizationSettings(args.quan_mode, args.quan_bits)
