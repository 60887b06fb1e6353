"""Model families with tiny configs, and how each of their weights is to be routed, by what the models' code does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Family:
    """A model and its routing.

    Attributes:
        build: makes it, given the library that has it.
        matrix: names → group keys of what is stepped as a matrix, "" for none; alternatives are for other sizes.
        rest: names of what has rows and columns, but is for AdamW or Lion.

    Names have # for numbers of layers; braces stand for each of what they hold.
    """

    name: str
    kind: str
    library: str
    build: Callable[[Any], nn.Module]
    matrix: dict[str, str]
    rest: set[str]


def _small(t: Any, config: str, model: str, **sizes: Any) -> nn.Module:
    return getattr(t, model)(getattr(t, config)(**sizes))


#: Sizes that most configs of transformers know.
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GQA = {**TINY, "num_key_value_heads": 2}
MOE = {**GQA, "moe_intermediate_size": 24, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
LAYERS = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}


def _backbone(t: Any, *widths: int) -> dict[str, Any]:
    """A small ResNet for a detector."""
    stages = [f"stage{k}" for k in range(2, len(widths) + 1)]
    config = t.ResNetConfig(embedding_size=8, hidden_sizes=list(widths), depths=[1] * len(widths), out_features=stages)
    return {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": config}


FAMILIES = [
    Family(
        "GPT-2",
        "language",
        "transformers",
        lambda t: _small(
            t, "GPT2Config", "GPT2LMHeadModel", vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4
        ),
        {
            "transformer.h.#.attn.c_attn.weight": "transposed=True, split_sizes=(32,32,32)",
            "transformer.h.#.attn.c_proj.weight": "transposed=True",
            "transformer.h.#.mlp.{c_fc,c_proj}.weight": "transposed=True",
        },
        {
            "transformer.{wte,wpe}.weight",
        },
    ),
    Family(
        "Llama",
        "language",
        "transformers",
        lambda t: _small(t, "LlamaConfig", "LlamaForCausalLM", **GQA),
        {
            "model.layers.#.self_attn.{q_proj,k_proj,v_proj,o_proj}.weight": "",
            "model.layers.#.mlp.{gate_proj,up_proj,down_proj}.weight": "",
        },
        {
            "model.embed_tokens.weight",
            "lm_head.weight",
        },
    ),
    Family(
        "Phi-3",
        "language",
        "transformers",
        lambda t: _small(t, "Phi3Config", "Phi3ForCausalLM", **GQA, pad_token_id=0),
        {
            "model.layers.#.self_attn.o_proj.weight": "",
            "model.layers.#.mlp.down_proj.weight": "",
            "model.layers.#.self_attn.qkv_proj.weight": "split_sizes=(32,16,16)",
            "model.layers.#.mlp.gate_up_proj.weight": "split_sizes=(80,80)",
        },
        {
            "model.embed_tokens.weight",
            "lm_head.weight",
        },
    ),
    Family(
        "GPT-NeoX",
        "language",
        "transformers",
        lambda t: _small(t, "GPTNeoXConfig", "GPTNeoXForCausalLM", **TINY),
        {
            "gpt_neox.layers.#.attention.query_key_value.weight": "split_sizes=(8,8,8), interleaved=4",
            "gpt_neox.layers.#.attention.dense.weight": "",
            "gpt_neox.layers.#.mlp.{dense_h_to_4h,dense_4h_to_h}.weight": "",
        },
        {
            "gpt_neox.embed_in.weight",
            "lm_head.weight",
        },
    ),
    Family(
        "BLOOM",
        "language",
        "transformers",
        lambda t: _small(t, "BloomConfig", "BloomForCausalLM", vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
        {
            "transformer.h.#.self_attention.query_key_value.weight": "split_sizes=(8,8,8), interleaved=4",
            "transformer.h.#.self_attention.dense.weight": "",
            "transformer.h.#.mlp.{dense_h_to_4h,dense_4h_to_h}.weight": "",
        },
        {
            "transformer.word_embeddings.weight",
        },
    ),
    Family(
        "Falcon",
        "language",
        "transformers",
        lambda t: _small(
            t,
            "FalconConfig",
            "FalconForCausalLM",
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
        ),
        {
            "transformer.h.#.self_attention.query_key_value.weight": "split_sizes=(16,8,8), interleaved=2",
            "transformer.h.#.self_attention.dense.weight": "",
            "transformer.h.#.mlp.{dense_h_to_4h,dense_4h_to_h}.weight": "",
        },
        {
            "transformer.word_embeddings.weight",
        },
    ),
    Family(
        "GPT-BigCode",
        "language",
        "transformers",
        lambda t: _small(
            t,
            "GPTBigCodeConfig",
            "GPTBigCodeForCausalLM",
            vocab_size=96,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
        ),
        {
            "transformer.h.#.attn.c_attn.weight": "split_sizes=(32,8,8)",
            "transformer.h.#.attn.c_proj.weight": "",
            "transformer.h.#.mlp.{c_fc,c_proj}.weight": "",
        },
        {
            "transformer.{wte,wpe}.weight",
        },
    ),
    Family(
        "MPT",
        "language",
        "transformers",
        lambda t: _small(t, "MptConfig", "MptForCausalLM", vocab_size=96, d_model=32, n_layers=2, n_heads=4),
        {
            "transformer.blocks.#.attn.Wqkv.weight": "split_sizes=(32,32,32)",
            "transformer.blocks.#.attn.out_proj.weight": "",
            "transformer.blocks.#.ffn.{up_proj,down_proj}.weight": "",
        },
        {
            "transformer.wte.weight",
        },
    ),
    Family(
        "BERT",
        "language",
        "transformers",
        lambda t: _small(t, "BertConfig", "BertForSequenceClassification", **TINY, num_labels=3),
        {
            "bert.encoder.layer.#.attention.self.{query,key,value}.weight": "",
            "bert.encoder.layer.#.attention.output.dense.weight": "",
            "bert.encoder.layer.#.{intermediate,output}.dense.weight": "",
            "bert.pooler.dense.weight": "",
        },
        {
            "bert.embeddings.{word_embeddings,position_embeddings,token_type_embeddings}.weight",
            "classifier.weight",
        },
    ),
    Family(
        "ModernBERT",
        "language",
        "transformers",
        lambda t: _small(
            t,
            "ModernBertConfig",
            "ModernBertForMaskedLM",
            **TINY,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
        {
            "model.layers.#.attn.Wqkv.weight": "split_sizes=(32,32,32)",
            "model.layers.#.{attn,mlp}.Wo.weight": "",
            "head.dense.weight": "",
            "model.layers.#.mlp.Wi.weight": "split_sizes=(80,80)",
        },
        {
            "model.embeddings.tok_embeddings.weight",
        },
    ),
    Family(
        "T5",
        "language",
        "transformers",
        lambda t: _small(
            t,
            "T5Config",
            "T5ForConditionalGeneration",
            vocab_size=96,
            d_model=32,
            d_kv=8,
            d_ff=80,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        ),
        {
            "encoder.block.#.layer.#.SelfAttention.{q,k,v,o}.weight": "",
            "{encoder,decoder}.block.#.layer.#.DenseReluDense.{wi_0,wi_1,wo}.weight": "",
            "decoder.block.#.layer.#.{SelfAttention,EncDecAttention}.{q,k,v,o}.weight": "",
        },
        {
            "shared.weight",
            "{encoder,decoder}.block.#.layer.#.SelfAttention.relative_attention_bias.weight",
        },
    ),
    Family(
        "XLNet",
        "language",
        "transformers",
        lambda t: _small(
            t,
            "XLNetConfig",
            "XLNetForSequenceClassification",
            vocab_size=96,
            d_model=32,
            n_layer=2,
            n_head=4,
            d_inner=80,
            num_labels=3,
        ),
        {
            "transformer.layer.#.rel_attn.{q,k,v,o,r}": "flatten=True",
            "transformer.layer.#.ff.{layer_1,layer_2}.weight": "",
            "sequence_summary.summary.weight": "",
        },
        {
            "transformer.word_embedding.weight",
            "transformer.layer.#.rel_attn.seg_embed",
            "logits_proj.weight",
        },
    ),
    Family(
        "Mixtral",
        "mixture of experts",
        "transformers",
        lambda t: _small(t, "MixtralConfig", "MixtralForCausalLM", **GQA, num_local_experts=4),
        {
            "model.layers.#.self_attn.{q_proj,k_proj,v_proj,o_proj}.weight": "",
            "model.layers.#.mlp.experts.down_proj": "",
            "model.layers.#.mlp.experts.gate_up_proj": "split_sizes=(80,80)",
        },
        {
            "model.embed_tokens.weight",
            "model.layers.#.mlp.gate.weight",
            "lm_head.weight",
        },
    ),
    Family(
        "GPT-OSS",
        "mixture of experts",
        "transformers",
        lambda t: _small(t, "GptOssConfig", "GptOssForCausalLM", **GQA, head_dim=8, num_local_experts=4),
        {
            "model.layers.#.self_attn.{q_proj,k_proj,v_proj,o_proj}.weight": "",
            "model.layers.#.mlp.experts.gate_up_proj": "transposed=True, split_sizes=(1,1), interleaved=80",
            "model.layers.#.mlp.experts.down_proj": "transposed=True",
        },
        {
            "model.embed_tokens.weight",
            "model.layers.#.mlp.router.weight",
            "lm_head.weight",
        },
    ),
    Family(
        "Llama 4",
        "mixture of experts",
        "transformers",
        lambda t: _small(
            t, "Llama4TextConfig", "Llama4ForCausalLM", **GQA, intermediate_size_mlp=96, num_local_experts=4, head_dim=8
        ),
        {
            "model.layers.#.self_attn.{q_proj,k_proj,v_proj,o_proj}.weight": "",
            "model.layers.#.feed_forward.shared_expert.{gate_proj,up_proj,down_proj}.weight": "",
            "model.layers.#.feed_forward.experts.gate_up_proj": "transposed=True, split_sizes=(80,80)",
            "model.layers.#.feed_forward.experts.down_proj": "transposed=True",
        },
        {
            "model.embed_tokens.weight",
            "model.layers.#.feed_forward.router.weight",
            "lm_head.weight",
        },
    ),
    Family(
        "DeepSeek-V3",
        "mixture of experts",
        "transformers",
        lambda t: _small(
            t,
            "DeepseekV3Config",
            "DeepseekV3ForCausalLM",
            **TINY,
            moe_intermediate_size=24,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=12,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        {
            "model.layers.#.self_attn.{q_a_proj,q_b_proj,o_proj}.weight": "",
            "model.layers.#.mlp.{gate_proj,up_proj,down_proj}.weight": "",
            "model.layers.#.mlp.experts.down_proj": "",
            "model.layers.#.mlp.shared_experts.{gate_proj,up_proj,down_proj}.weight": "",
            "model.layers.#.self_attn.kv_a_proj_with_mqa.weight": "split_sizes=(12,4)",
            "model.layers.#.self_attn.kv_b_proj.weight": "split_sizes=(8,8), interleaved=4",
            "model.layers.#.mlp.experts.gate_up_proj": "split_sizes=(24,24)",
        },
        {
            "model.embed_tokens.weight",
            "model.layers.#.mlp.gate.weight",
            "lm_head.weight",
        },
    ),
    Family(
        "DBRX",
        "mixture of experts",
        "transformers",
        lambda t: _small(
            t,
            "DbrxConfig",
            "DbrxForCausalLM",
            vocab_size=96,
            d_model=32,
            n_layers=2,
            n_heads=4,
            max_seq_len=64,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            ffn_config={"ffn_hidden_size": 80, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        ),
        {
            "transformer.blocks.#.norm_attn_norm.attn.Wqkv.weight": "split_sizes=(32,16,16)",
            "transformer.blocks.#.norm_attn_norm.attn.out_proj.weight": "",
            "transformer.blocks.#.ffn.experts.mlp.{w1,v1}": "split_sizes=(80,80,80,80)",
        },
        {
            "transformer.wte.weight",
            "transformer.blocks.#.ffn.router.layer.weight",
            "transformer.blocks.#.ffn.experts.mlp.w2",
            "lm_head.weight",
        },
    ),
    Family(
        "Mamba",
        "state space",
        "transformers",
        lambda t: _small(
            t, "MambaConfig", "MambaForCausalLM", vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8
        ),
        {
            "backbone.layers.#.mixer.in_proj.weight": "split_sizes=(64,64)",
            "backbone.layers.#.mixer.x_proj.weight": "split_sizes=(2,8,8)",
            "backbone.layers.#.mixer.{dt_proj,out_proj}.weight": "",
        },
        {
            "backbone.embeddings.weight",
            "backbone.layers.#.mixer.A_log",
            "backbone.layers.#.mixer.conv1d.weight",
        },
    ),
    Family(
        "Mamba-2",
        "state space",
        "transformers",
        lambda t: _small(
            t,
            "Mamba2Config",
            "Mamba2ForCausalLM",
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
            num_heads=8,
            head_dim=8,
            n_groups=2,
        ),
        {
            "backbone.layers.#.mixer.in_proj.weight": "split_sizes=(64,64,16,16,8)",
            "backbone.layers.#.mixer.out_proj.weight": "",
        },
        {
            "backbone.embeddings.weight",
            "backbone.layers.#.mixer.conv1d.weight",
            "lm_head.weight",
        },
    ),
    Family(
        "Qwen3-Next",
        "state space",
        "transformers",
        lambda t: _small(
            t,
            "Qwen3NextConfig",
            "Qwen3NextForCausalLM",
            **{**MOE, "num_hidden_layers": 4},
            head_dim=8,
            shared_expert_intermediate_size=24,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        {
            "model.layers.#.linear_attn.in_proj_qkvz.weight": "split_sizes=(8,8,16,16), interleaved=2",
            "model.layers.#.linear_attn.{in_proj_ba,out_proj}.weight": "",
            "model.layers.#.mlp.experts.down_proj": "",
            "model.layers.#.mlp.shared_expert.{gate_proj,up_proj,down_proj}.weight": "",
            "model.layers.#.self_attn.{k_proj,v_proj,o_proj}.weight": "",
            "model.layers.#.mlp.experts.gate_up_proj": "split_sizes=(24,24)",
            "model.layers.#.self_attn.q_proj.weight": "split_sizes=(8,8), interleaved=4",
        },
        {
            "model.embed_tokens.weight",
            "model.layers.#.linear_attn.conv1d.weight",
            "model.layers.#.mlp.gate.weight",
            "lm_head.weight",
        },
    ),
    Family(
        "ViT",
        "vision",
        "timm",
        lambda t: t.create_model("vit_tiny_patch16_224", depth=2, num_classes=10),
        {
            "patch_embed.proj.weight": "flatten=True",
            "blocks.#.attn.qkv.weight": "split_sizes=(192,192,192)",
            "blocks.#.attn.proj.weight": "",
            "blocks.#.mlp.{fc1,fc2}.weight": "",
        },
        {
            "pos_embed",
            "head.weight",
        },
    ),
    Family(
        "ResNet",
        "vision",
        "timm",
        lambda t: t.create_model("resnet18", num_classes=10),
        {
            "conv1.weight": "flatten=True",
            "{layer1,layer2,layer3,layer4}.#.{conv1,conv2}.weight": "flatten=True",
            "{layer2,layer3,layer4}.#.downsample.#.weight": "flatten=True",
        },
        {
            "fc.weight",
        },
    ),
    Family(
        "ConvNeXt",
        "vision",
        "timm",
        lambda t: t.create_model("convnext_atto", num_classes=10),
        {
            "stem.#.weight": "flatten=True",
            "stages.#.blocks.#.mlp.{fc1,fc2}.weight": "flatten=True",
            "stages.#.downsample.#.weight": "flatten=True",
        },
        {
            "stages.#.blocks.#.conv_dw.weight",
            "head.fc.weight",
        },
    ),
    Family(
        "Swin",
        "vision",
        "timm",
        lambda t: t.create_model("swin_tiny_patch4_window7_224", depths=(2, 2), num_heads=(3, 6), num_classes=10),
        {
            "patch_embed.proj.weight": "flatten=True",
            "layers.#.blocks.#.attn.qkv.weight": "split_sizes=(96,96,96) | split_sizes=(192,192,192)",
            "layers.#.blocks.#.attn.proj.weight": "",
            "layers.#.blocks.#.mlp.{fc1,fc2}.weight": "",
            "layers.#.downsample.reduction.weight": "",
        },
        {
            "layers.#.blocks.#.attn.relative_position_bias_table",
            "head.fc.weight",
        },
    ),
    Family(
        "LeViT",
        "vision",
        "timm",
        lambda t: t.create_model("levit_128s", num_classes=10),
        {
            "stem.{conv1,conv2,conv3,conv4}.linear.weight": "flatten=True",
            "stages.#.blocks.#.attn.qkv.linear.weight": "split_sizes=(16,16,32), interleaved={4,6,8}",
            "stages.#.blocks.#.attn.proj.ln.linear.weight": "",
            "stages.#.blocks.#.mlp.{ln1,ln2}.linear.weight": "",
            "stages.#.downsample.attn_downsample.{q,proj}.ln.linear.weight": "",
            "stages.#.downsample.mlp.{ln1,ln2}.linear.weight": "",
            "stages.#.downsample.attn_downsample.kv.linear.weight": "split_sizes=(16,64), interleaved={8,16}",
        },
        {
            "stages.#.blocks.#.attn.attention_biases",
            "stages.#.downsample.attn_downsample.attention_biases",
            "{head,head_dist}.linear.weight",
        },
    ),
    Family(
        "MViTv2",
        "vision",
        "timm",
        lambda t: t.create_model("mvitv2_tiny", num_classes=10),
        {
            "patch_embed.proj.weight": "flatten=True",
            "stages.#.blocks.#.attn.qkv.weight": " | ".join(f"split_sizes=({d},{d},{d})" for d in (96, 192, 384, 768)),
            "stages.#.blocks.#.attn.proj.weight": "",
            "stages.#.blocks.#.mlp.{fc1,fc2}.weight": "",
            "stages.#.blocks.#.shortcut_proj_attn.weight": "",
        },
        {
            "stages.#.blocks.#.attn.{rel_pos_h,rel_pos_w}",
            "stages.#.blocks.#.attn.{pool_q,pool_k,pool_v}.weight",
            "head.fc.weight",
        },
    ),
    Family(
        "SegFormer",
        "vision",
        "transformers",
        lambda t: _small(
            t,
            "SegformerConfig",
            "SegformerForSemanticSegmentation",
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 16, 32, 64],
            decoder_hidden_size=32,
            num_labels=5,
        ),
        {
            "segformer.stages.#.patch_embeddings.proj.weight": "flatten=True",
            "segformer.stages.#.blocks.#.attention.sequence_reduction.sequence_reduction.weight": "flatten=True",
            "decode_head.linear_fuse.weight": "flatten=True",
            "segformer.stages.#.blocks.#.attention.{q_proj,k_proj,v_proj,o_proj}.weight": "",
            "segformer.stages.#.blocks.#.mlp.{fc1,fc2}.weight": "",
            "decode_head.linear_projections.#.proj.weight": "",
        },
        {
            "segformer.stages.#.blocks.#.mlp.dwconv.dwconv.weight",
            "decode_head.classifier.weight",
        },
    ),
    Family(
        "DETR",
        "detection",
        "transformers",
        lambda t: _small(
            t, "DetrConfig", "DetrForObjectDetection", **_backbone(t, 8, 16), **LAYERS, num_queries=10, num_labels=5
        ),
        {
            "model.input_projection.weight": "flatten=True",
            "model.encoder.layers.#.self_attn.{k_proj,v_proj,q_proj,o_proj}.weight": "",
            "model.{encoder,decoder}.layers.#.mlp.{fc1,fc2}.weight": "",
            "model.decoder.layers.#.{self_attn,encoder_attn}.{k_proj,v_proj,q_proj,o_proj}.weight": "",
            "bbox_predictor.layers.#.weight": "",
        },
        {
            "model.query_position_embeddings.weight",
            "class_labels_classifier.weight",
            "bbox_predictor.layers.#.weight",
        },
    ),
    Family(
        "Deformable DETR",
        "detection",
        "transformers",
        lambda t: _small(
            t,
            "DeformableDetrConfig",
            "DeformableDetrForObjectDetection",
            **_backbone(t, 8, 16, 32, 32),
            **LAYERS,
            num_queries=10,
            num_labels=5,
            with_box_refine=True,
            two_stage=False,
        ),
        {
            "model.input_proj.#.#.weight": "flatten=True",
            "model.encoder.layers.#.self_attn.{sampling_offsets,attention_weights,{value,output}_proj}.weight": "",
            "model.{encoder,decoder}.layers.#.mlp.{fc1,fc2}.weight": "",
            "model.decoder.layers.#.self_attn.{k_proj,v_proj,q_proj,o_proj}.weight": "",
            "model.decoder.layers.#.encoder_attn.{sampling_offsets,attention_weights,{value,output}_proj}.weight": "",
            "model.decoder.bbox_embed.#.layers.#.weight": "",
        },
        {
            "model.level_embed",
            "model.{query_position_embeddings,reference_points}.weight",
            "model.decoder.bbox_embed.#.layers.#.weight",
            "class_embed.#.weight",
        },
    ),
    Family(
        "CLIP",
        "vision and language",
        "transformers",
        lambda t: t.CLIPModel(
            t.CLIPConfig(
                text_config={**TINY, "projection_dim": 24},
                vision_config={
                    "hidden_size": 32,
                    "intermediate_size": 80,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "image_size": 32,
                    "patch_size": 8,
                    "projection_dim": 24,
                },
                projection_dim=24,
            )
        ),
        {
            "{text_model,vision_model}.encoder.layers.#.self_attn.{k_proj,v_proj,q_proj,out_proj}.weight": "",
            "{text_model,vision_model}.encoder.layers.#.mlp.{fc1,fc2}.weight": "",
            "{visual_projection,text_projection}.weight": "",
            "vision_model.embeddings.patch_embedding.weight": "flatten=True",
        },
        {
            "text_model.embeddings.{token_embedding,position_embedding}.weight",
            "vision_model.embeddings.position_embedding.weight",
        },
    ),
    Family(
        "Whisper",
        "speech",
        "transformers",
        lambda t: _small(
            t,
            "WhisperConfig",
            "WhisperForConditionalGeneration",
            vocab_size=96,
            **LAYERS,
            max_source_positions=50,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        {
            "model.encoder.{conv1,conv2}.weight": "flatten=True",
            "model.encoder.layers.#.self_attn.{k_proj,v_proj,q_proj,out_proj}.weight": "",
            "model.{encoder,decoder}.layers.#.{fc1,fc2}.weight": "",
            "model.decoder.layers.#.{self_attn,encoder_attn}.{k_proj,v_proj,q_proj,out_proj}.weight": "",
        },
        {
            "model.decoder.{embed_tokens,embed_positions}.weight",
        },
    ),
    Family(
        "wav2vec 2.0",
        "speech",
        "transformers",
        lambda t: _small(
            t,
            "Wav2Vec2Config",
            "Wav2Vec2ForCTC",
            **{k: v for k, v in TINY.items() if k != "max_position_embeddings"},
            conv_dim=(16, 16),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        ),
        {
            "wav2vec2.feature_extractor.conv_layers.#.conv.weight": "flatten=True",
            "wav2vec2.feature_projection.projection.weight": "",
            "wav2vec2.encoder.layers.#.attention.{k_proj,v_proj,q_proj,out_proj}.weight": "",
            "wav2vec2.encoder.layers.#.feed_forward.{intermediate_dense,output_dense}.weight": "",
            "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1": "flatten=True, "
            "split_sizes=(8,8,8,8)",
        },
        {
            "lm_head.weight",
        },
    ),
    Family(
        "EnCodec",
        "audio codec",
        "transformers",
        lambda t: _small(
            t,
            "EncodecConfig",
            "EncodecModel",
            num_filters=8,
            hidden_size=32,
            codebook_size=16,
            codebook_dim=32,
            upsampling_ratios=[4, 2],
        ),
        {
            "{encoder,decoder}.layers.#.conv.parametrizations.weight.original1": "flatten=True",
            "{encoder,decoder}.layers.#.block.#.conv.parametrizations.weight.original1": "flatten=True",
            "{encoder,decoder}.layers.#.shortcut.conv.parametrizations.weight.original1": "flatten=True",
            "{encoder,decoder}.layers.#.lstm.weight_{ih,hh}_l{0,1}": "split_sizes=(32,32,32,32)",
        },
        {
            "decoder.layers.#.conv.parametrizations.weight.original1",
        },
    ),
    Family(
        "DAC",
        "audio codec",
        "transformers",
        lambda t: _small(
            t,
            "DacConfig",
            "DacModel",
            encoder_hidden_size=8,
            downsampling_ratios=[2, 4],
            decoder_hidden_size=32,
            upsampling_ratios=[4, 2],
            n_codebooks=2,
            codebook_size=16,
            codebook_dim=4,
        ),
        {
            "encoder.{conv1,conv2}.weight": "flatten=True",
            "{encoder,decoder}.block.#.{res_unit1,res_unit2,res_unit3}.{conv1,conv2}.weight": "flatten=True",
            "encoder.block.#.conv1.weight": "flatten=True",
            "decoder.conv1.weight": "flatten=True",
            "quantizer.quantizers.#.{in_proj,out_proj}.weight": "flatten=True",
        },
        {
            "decoder.block.#.conv_t1.weight",
            "decoder.conv2.weight",
            "quantizer.quantizers.#.codebook.weight",
        },
    ),
]
