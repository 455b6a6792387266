"""Which parameters the optimizer decays, and by how much their learning rate is scaled."""

from __future__ import annotations

from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from refiner_ds.config.schema import RecipeKeys
from refiner_ds.models import RefinedViT


def parameter_groups(recipe: RecipeKeys, model: RefinedViT) -> list[dict[str, Any]]:
    """timm's groups: no decay on 1-D parameters and on what the model names in ``no_weight_decay``.

    With ``layer_decay`` d, the heads learn at the full rate and each layer before at d times the next one's: the
    group's ``lr_scale``. Layers are stem and embeddings, each block (the last one with the final norm), and the heads.
    Frozen parameters are in no group.
    """
    spared = model.no_weight_decay()
    if recipe.layer_decay is None:
        return param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=spared)
    return param_groups_layer_decay(
        model, recipe.weight_decay, no_weight_decay_list=spared, layer_decay=recipe.layer_decay
    )
