"""Which channels every tensor of a network must store, once some layers have lost output channels.

`tracing` writes a network down as a torch.fx graph. `plan` walks that graph and gives each node a `Step` (`channels`): the
channels its result stores, and the channels it wants of its inputs. A channel that is not stored is zero wherever the network
reads it. That stays true through an operation that maps zero to zero; before any other operation, known or not, the step
wants the full width back, so a plan never changes the function, it only stops saving. What each operation does is said in
`rules`, one file a family; a new one is one function with `@rule(...)` above it.

`models.narrow` builds modules from a plan, `prune.compact` uses one to find out which channels are zero.
"""

from models.graph.channel_graph import ChannelGraph, Kept, inputs_in_order
from models.graph.channels import Channels, LayerCut, Plan, Step, all_channels, members_of_layer
from models.graph.concrete import attribute
from models.graph.plan import (
    LiveOutputs,
    Restored,
    missing_carriers,
    output_channels,
    restored_channels,
    whole_layers,
)
from models.graph.rules.sizes import counted_channels
from models.graph.tracing import Trace, is_mode, trace_network

__all__ = [
    "ChannelGraph",
    "Channels",
    "Kept",
    "LayerCut",
    "LiveOutputs",
    "Plan",
    "Restored",
    "Step",
    "Trace",
    "all_channels",
    "attribute",
    "counted_channels",
    "inputs_in_order",
    "is_mode",
    "members_of_layer",
    "missing_carriers",
    "output_channels",
    "restored_channels",
    "trace_network",
    "whole_layers",
]
