"""Language models."""

from .family import GQA, TINY, Family, small

FAMILIES = [
    Family(
        "GPT-2",
        "language",
        "transformers",
        lambda t: small(
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
        lambda t: small(t, "LlamaConfig", "LlamaForCausalLM", **GQA),
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
        lambda t: small(t, "Phi3Config", "Phi3ForCausalLM", **GQA, pad_token_id=0),
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
        lambda t: small(t, "GPTNeoXConfig", "GPTNeoXForCausalLM", **TINY),
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
        lambda t: small(t, "BloomConfig", "BloomForCausalLM", vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
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
        lambda t: small(
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
        lambda t: small(
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
        lambda t: small(t, "MptConfig", "MptForCausalLM", vocab_size=96, d_model=32, n_layers=2, n_heads=4),
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
        lambda t: small(t, "BertConfig", "BertForSequenceClassification", **TINY, num_labels=3),
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
        lambda t: small(
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
        lambda t: small(
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
        lambda t: small(
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
]
