"""Tiny networks over tokens, built from a configuration: ViT, DeiT, Swin, BERT, GPT-2, Llama."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

CLASSES, WORDS = 5, 50
Inputs = Tensor | dict[str, Tensor]


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def words() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, WORDS, (2, 12), generator=torch.Generator().manual_seed(1))}


def timm_vit() -> nn.Module:
    return _timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2)


def timm_deit() -> nn.Module:
    return _timm("deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2)


def timm_swin() -> nn.Module:
    name = "swin_tiny_patch4_window7_224"
    return _timm(name, img_size=32, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4))


def torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=CLASSES)


def torchvision_swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=CLASSES)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16, num_labels=CLASSES,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=24, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0,
        use_cache=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    """With the plain attention: its fused one looks at values, which a prediction has not, to drop its mask."""
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=48, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "timm-vit": (timm_vit, images),
    "timm-deit": (timm_deit, images),
    "timm-swin": (timm_swin, images),
    "torchvision-vit": (torchvision_vit, images),
    "torchvision-swin": (torchvision_swin, images),
    "bert": (bert, words),
    "gpt2": (gpt2, words),
    "llama": (llama, words),
}


def make(name: str) -> tuple[nn.Module, Inputs]:
    """A network in eval mode (nothing is drawn at random) with fixed values, and its input."""
    torch.manual_seed(0)
    build, inputs = NETWORKS[name]
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and scales of a new network are trivial ones
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval(), inputs()


def logits(model: nn.Module, inputs: Any) -> Tensor:
    """The output as one tensor [N, ..., classes]."""
    result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    found: Tensor = result if isinstance(result, Tensor) else result.logits
    return found


def labelled(inputs: Any) -> tuple[Any, Tensor]:
    """The inputs with a label for each sample."""
    return inputs, torch.tensor([1, 3])


def loss_of(output: Any, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample's (last token's) scores."""
    scores = output if isinstance(output, Tensor) else output.logits
    scores = scores if scores.dim() == 2 else scores[:, -1]
    return nn.functional.cross_entropy(scores, labels)


def _timm(name: str, **options: Any) -> nn.Module:
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)
    return model
