"""Models of sound."""

from .family import LAYERS, TINY, Family, small

FAMILIES = [
    Family(
        "Whisper",
        "speech",
        "transformers",
        lambda t: small(
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
        lambda t: small(
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
        lambda t: small(
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
        lambda t: small(
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
