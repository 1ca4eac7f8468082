"""Tiny pipelines of other kinds than Stable Diffusion's, of the real classes with random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests import builders

WIDTH = 16  # of every text encoder
FLOW_VAE = {
    **builders.VAE,
    "scaling_factor": 1.5,
    "shift_factor": 0.06,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def t5_tokenizer() -> Any:
    """Knows letters alone; the real class, which needs no network nor SentencePiece."""
    pieces = ["<pad>", "</s>", "<unk>", *"▁abcdefghijklmnopqrstuvwxyz,.'-"]
    return T5Tokenizer(vocab=[(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0)


def t5(words: Any, width: int = WIDTH) -> Any:
    return T5EncoderModel(T5Config(vocab_size=len(words), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def clip(words: Any, kind: Any = CLIPTextModel) -> Any:
    encoder = kind(
        CLIPTextConfig(
            vocab_size=len(words),
            max_position_embeddings=words.model_max_length,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=WIDTH,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    for parameter in encoder.parameters():
        parameter.data.mul_(5)  # as in builders.pipeline
    return encoder


def sdxl() -> StableDiffusionXLPipeline:
    words = builders.read_tokenizer()
    unet = {**builders.UNET, "cross_attention_dim": 2 * WIDTH, "use_linear_projection": True}
    times = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**builders.VAE),
        text_encoder=clip(words),
        text_encoder_2=clip(words, CLIPTextModelWithProjection),
        tokenizer=words,
        tokenizer_2=words,
        unet=UNet2DConditionModel(**unet, **times, projection_class_embeddings_input_dim=6 * 8 + WIDTH),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
    )


def sd3() -> StableDiffusion3Pipeline:
    words, letters = builders.read_tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=64,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(**FLOW_VAE),
        text_encoder=clip(words, CLIPTextModelWithProjection),
        tokenizer=words,
        text_encoder_2=clip(words, CLIPTextModelWithProjection),
        tokenizer_2=words,
        text_encoder_3=t5(letters, 2 * WIDTH),
        tokenizer_3=letters,
    )


def flux() -> FluxPipeline:
    words, letters = builders.read_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=AutoencoderKL(**FLOW_VAE),
        text_encoder=clip(words),
        tokenizer=words,
        text_encoder_2=t5(letters),
        tokenizer_2=letters,
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def pixart() -> PixArtSigmaPipeline:
    letters = t5_tokenizer()
    return PixArtSigmaPipeline(
        tokenizer=letters,
        text_encoder=t5(letters),
        vae=AutoencoderKL(**builders.VAE),
        transformer=PixArtTransformer2DModel(
            sample_size=32,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=WIDTH,
            in_channels=4,
            cross_attention_dim=16,
            out_channels=8,
            attention_bias=True,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            use_additional_conditions=False,
        ),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear"),
    )


def qwen() -> QwenImagePipeline:
    letters = {letter: rank for rank, letter in enumerate("abcdefghijklmnopqrstuvwxyzĠĊ:,.<|>_")}
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={
                    "vocab_size": 64,
                    "hidden_size": WIDTH,
                    "intermediate_size": 16,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
                },
                vision_config={
                    "depth": 1,
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_heads": 2,
                    "out_hidden_size": WIDTH,
                },
            )
        ),
        tokenizer=Qwen2Tokenizer(vocab=letters, merges=[], unk_token="_", pad_token="_"),
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(8, 4, 4),
        ),
    )


def lcm() -> LatentConsistencyModelPipeline:
    """Takes no negative prompt, and no other sampler than its own."""
    parts = builders.pipeline().components
    return LatentConsistencyModelPipeline(
        **{
            **parts,
            "unet": UNet2DConditionModel(**builders.UNET, time_cond_proj_dim=32),
            "scheduler": LCMScheduler(**{**builders.SCHEDULER, "steps_offset": 0}),
        },
        requires_safety_checker=False,
    )


FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "qwen": qwen,
    "lcm": lcm,
}


def save(family: str, folder: Path, seed: int = 0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = FAMILIES[family]()
    pipeline.save_pretrained(folder)
    return folder


LAYERS = ("to_q", "to_v", "to_out.0")
TEXT_LAYERS = ("q_proj", "out_proj")


def lora(file: Path, folder: Path, seed: int = 5, *, alpha: float | None = None, text: bool = True) -> Path:
    """A LoRA for the pipeline in `folder`, as diffusers saves it; `alpha` is in its metadata."""
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    layers = {denoiser(pipeline): LAYERS} | ({"text_encoder": TEXT_LAYERS} if text else {})
    tensors: builders.Tensors = {}
    config: dict[str, Any] = {}
    for component, endings in layers.items():
        module = getattr(pipeline, component)
        names = tuple(name for name, _ in module.named_modules() if name.endswith(endings))
        for name, pair in builders.factors(module, names, seed=seed).items():
            tensors |= {f"{component}.{name}.lora_{role}.weight": tensor for role, tensor in pair.items()}
        if alpha is not None:
            config |= {f"{component}.r": 2, f"{component}.lora_alpha": alpha, f"{component}.target_modules": [*endings]}
    save_file(tensors, file, {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(config)} if config else {}))
    return file


def denoiser(pipeline: DiffusionPipeline) -> str:
    return "unet" if hasattr(pipeline, "unet") else "transformer"
