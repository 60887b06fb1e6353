"""Models of images."""

from .family import LAYERS, TINY, Family, backbone, small

FAMILIES = [
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
        lambda t: small(
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
        lambda t: small(
            t, "DetrConfig", "DetrForObjectDetection", **backbone(t, 8, 16), **LAYERS, num_queries=10, num_labels=5
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
        lambda t: small(
            t,
            "DeformableDetrConfig",
            "DeformableDetrForObjectDetection",
            **backbone(t, 8, 16, 32, 32),
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
]
