"""token_network: a timm network whose output is its tokens, with the parameters of the original."""

import copy

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sslkit.backbones.blocks import can_pack, pack
from sslkit.backbones.swiglu import FusedSwiGLU


def token_network(vit: VisionTransformer | Eva) -> VisionTransformer | Eva:
    """Copy ``vit`` without its head, with packed blocks and the final norm at ``norm``.

    The copy has modules and buffers of its own and shares every parameter, name by name, with
    ``vit``, which is left as it is.
    """
    network = copy.deepcopy(vit, {id(parameter): parameter for parameter in vit.parameters()})
    network.reset_classifier(0, global_pool="")
    if isinstance(network.norm, nn.Identity):
        network.norm, network.fc_norm = network.fc_norm, nn.Identity()
    for i, block in enumerate(network.blocks):
        if can_pack(block, token_wise_mlps=(FusedSwiGLU,)):
            network.blocks[i] = pack(block)
    return network
