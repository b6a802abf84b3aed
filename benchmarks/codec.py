"""The Huffman coder on one core: symbols a second each way and size beside the order-0 entropy, with zlib's as a yardstick.

python -m benchmarks.codec
python -m benchmarks.codec --load-path saves/quantized/model_compact.pt
python -m benchmarks.codec --nncodec --networks saves/teacher/model_best.pt --data-dir data/cifar10 --picture curves.svg
"""

import argparse
import statistics
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from benchmarks import codec_curves
from benchmarks.common import add_common_flags, machine, report
from models.network_file import load_network
from quantize.codebook import find_codebook
from quantize.huffman import decode, encode, entropy_bits
from utils import cli
from utils.errors import UserError
from utils.timing import interleaved_seconds


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog="codec.py", description="Speed and size of the Huffman coder beside zlib's Huffman-only mode.")
    parser.add_argument("--load-path", metavar="FILE", help="checkpoint whose weights are quantized and coded as well")
    parser.add_argument("--symbols", type=cli.positive_int, default=1_000_000, help="length of each message")
    parser.add_argument(
        "--nncodec", action="store_true", help="only compare the second codec with nncodec, where that is installed"
    )
    parser.add_argument("--networks", nargs="+", metavar="FILE", help="checkpoints that --nncodec compares")
    parser.add_argument("--data-dir", metavar="DIR", help="their images: DIR/train/<class>, DIR/test/<class>")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="where --nncodec draws bytes against errors")
    add_common_flags(parser, name="codec", rounds=9, cpu_only=True)
    return parser


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if args.nncodec:
        return compare(args)
    if args.networks or args.data_dir or args.picture:
        raise UserError("--networks, --data-dir and --picture count only with --nncodec")
    rows = [measure(name, symbols, rounds=args.rounds) for name, symbols in messages(args).items()]
    report("codec", rows, output=args.output, machine=machine(torch.device("cpu")), rounds=args.rounds)


def compare(args: argparse.Namespace) -> None:
    """Bytes, errors and accuracy of both codecs, and the ratio of their bytes at equal errors."""
    cli.require(args, "networks", "data_dir")
    rows, found = [], {}
    for path in args.networks:
        own = list(codec_curves.rows_of(path, data_dir=args.data_dir))
        rows += own
        found[codec_curves.path_name(path)] = codec_curves.ratios(own)
    report("codec_nncodec", rows, output=args.output, machine=machine(torch.device("cpu")), bytes_over_nncodec=found)
    if args.picture is not None:
        codec_curves.draw(rows, args.picture)


def messages(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Indices of normal weights into codebooks of several sizes, two extremes, and the weights of --load-path."""
    stream = np.random.default_rng(0)
    weights = stream.normal(size=args.symbols).astype(np.float32)
    chosen = {f"normal weights, {bits} bits": find_codebook(weights, bits)[1] for bits in (3, 5, 8)}
    chosen["one in a hundred"] = (stream.random(args.symbols) < 0.01).astype(np.int64)
    chosen["65536 symbols, all alike"] = stream.integers(0, 1 << 16, args.symbols)
    if args.load_path is not None:
        network = load_network(args.load_path, flag="--load-path").network
        layers = [tensor.numpy().ravel() for tensor in network.state_dict().values() if tensor.dim() > 1]
        chosen["--load-path, 5 bits"] = np.concatenate([find_codebook(values, 5)[1] for values in layers])
    return chosen


def measure(name: str, symbols: np.ndarray, *, rounds: int) -> dict[str, object]:
    """One row: size over entropy, and millions of symbols a second; zlib takes bytes only."""
    payload, code_lengths = encode(symbols)
    work: dict[str, Callable[[], object]] = {
        "encode": lambda: encode(symbols),
        "decode": lambda: decode(payload, code_lengths, symbols.size),
    }
    if symbols.max() < 256:
        plain = symbols.astype(np.uint8).tobytes()
        packed = huffman_only(plain)
        work |= {"zlib encode": lambda: huffman_only(plain), "zlib decode": lambda: zlib.decompress(packed, -15)}
    seconds = interleaved_seconds(work, device=torch.device("cpu"), rounds=rounds)
    size = 8 * len(payload) / entropy_bits(np.bincount(symbols))
    return {"message": name, "symbols": symbols.size, "size / entropy": size, **speeds(seconds, symbols.size)}


def huffman_only(data: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return deflate.compress(data) + deflate.flush()


def speeds(seconds: Mapping[str, list[float]], symbols: int) -> dict[str, float | None]:
    kinds = ("encode", "decode", "zlib encode", "zlib decode")
    return {f"{kind} M/s": symbols / statistics.median(seconds[kind]) / 1e6 if kind in seconds else None for kind in kinds}


if __name__ == "__main__":
    cli.execute(lambda: main(get_args_parser().parse_args()))
