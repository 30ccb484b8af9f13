"""paamops: fused kernels and methods for filter pruning of convolutional networks in PyTorch.

channels = paamops.trace(model, example_inputs)          what can be removed, with what, at which cost
scores   = paamops.score(model, channels, inputs)        one number per filter; without images weight_scores
keep     = paamops.select(channels, scores, params=0.5)  which channel sets stay, under a budget
small    = paamops.pack(model, channels, keep)           a smaller dense network

paamops.AAP(model, inputs, train=…, evaluate=…, objective=paamops.Objective(…), epochs=…).run()
                                                         the same in rounds, to a target, by itself
paamops.PAAM(model, inputs, params=0.5).run(train=…, evaluate=…, epochs=…)
                                                         by scores that are learned from the filters
paamops.GlobalPru(model, inputs, rate=0.5).run(train=…, evaluate=…, epochs=…, images=…)
                                                         by one ranking that all images elect and the network learns
"""

from paamops import data, models
from paamops.channels import ChannelMap, Cost
from paamops.criteria import weight_scores
from paamops.excitation import excite
from paamops.methods.aap import AAP
from paamops.methods.globalpru import GlobalPru
from paamops.methods.objective import Objective
from paamops.methods.paam import PAAM
from paamops.ops.activation_attention import activation_attention
from paamops.ops.channel_attention import channel_attention
from paamops.ops.cumulative_threshold import cumulative_threshold
from paamops.ops.filter_attention import filter_attention
from paamops.ops.filter_distances import filter_distances
from paamops.ops.filter_norms import filter_norms
from paamops.ops.leaky_exponential import leaky_exponential
from paamops.ops.pack_channels import pack_channels
from paamops.ops.project_filters import project_filters
from paamops.ops.ranking_loss import ranking_loss
from paamops.ops.registration import build_info
from paamops.ops.relu_attention import relu_attention
from paamops.ops.scale_channels import scale_channels
from paamops.ops.scatter_channels import scatter_channels
from paamops.ops.tempered_sigmoid import tempered_sigmoid
from paamops.ops.vote_ranking import vote_ranking
from paamops.packing import PackingError, mask, pack
from paamops.plan import kept
from paamops.saving import load, save
from paamops.scoring import ActivationAttention, score
from paamops.selection import Selection, select
from paamops.tracing import trace

__version__ = "0.1.0"

__all__ = [
    "AAP",
    "PAAM",
    "ActivationAttention",
    "ChannelMap",
    "Cost",
    "GlobalPru",
    "Objective",
    "PackingError",
    "Selection",
    "activation_attention",
    "build_info",
    "channel_attention",
    "cumulative_threshold",
    "data",
    "excite",
    "filter_attention",
    "filter_distances",
    "filter_norms",
    "kept",
    "leaky_exponential",
    "load",
    "mask",
    "models",
    "pack",
    "pack_channels",
    "project_filters",
    "ranking_loss",
    "relu_attention",
    "save",
    "scale_channels",
    "scatter_channels",
    "score",
    "select",
    "tempered_sigmoid",
    "trace",
    "vote_ranking",
    "weight_scores",
]
