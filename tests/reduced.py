"Reduced backbones: the timm class and options of every named one, but four narrow blocks, so that tests are quick."
import torch

from reinpp.models.backbones import BACKBONES, create_backbone

NAMES = tuple(BACKBONES)


def reduced(name: str, image_size: int | tuple[int, int] = 64, **options):
    """The backbone `name`, frozen, with 4 blocks of width 48, 3 heads and patches of 16 pixels (tiny: 8).

    Its weights are random, the same each time."""
    sizes = dict(embed_dim=48, depth=4, num_heads=3) | ({} if name == "tiny" else dict(patch_size=16))
    if name.startswith(("sam_", "samvit")):
        sizes |= dict(window_size=3, global_attn_indexes=(1, 3))
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        vit = create_backbone(name, image_size, pretrained=False, **sizes | options)
    finally:
        torch.set_rng_state(state)
    # layer scale starts at 1e-5 in some classes, and positions at 0: then nothing would depend on anything
    with torch.no_grad():
        for key, p in vit.named_parameters():
            if key.endswith((".gamma", "gamma_1", "gamma_2")):
                p.fill_(0.5)
    return vit
