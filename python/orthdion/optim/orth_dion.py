"""Orth-Dion (arXiv 2605.16341), and its completed step."""

from __future__ import annotations

from .lowrank import LowRankOptimizer

__all__ = ["OrthDion"]


class OrthDion(LowRankOptimizer):
    r"""Low-rank spectral descent with an orthonormal right factor.

    For each weight X of shape (m, n), with gradient G, buffer M and warm start Q (n, r), one step is

    .. math::
        B &= M + G, \quad P = \mathrm{orth}(BQ), \quad R = B^\top P, \quad V = \mathrm{orth}(R) \\
        X &\leftarrow (1 - \eta\lambda) X - \eta \sqrt{m/n}\; P V^\top \\
        M &\leftarrow a (B - P R^\top) + b P R^\top, \qquad Q \leftarrow V

    so the step has exactly r singular values of 1 (Dion, which only normalises R's columns, has ones between 0 and
    :math:`\sqrt r`). The published form keeps a = μ of the residual and b = 0 of what was captured.

    With ``tail="normalized"`` or ``"linear"`` the step is *completed*: the residual T = B − P Rᵀ is applied at once,
    scaled so that its singular values have a root mean square of ``tail_scale``, and

    .. math::
        M \leftarrow M + G, \quad B = \mu M + G, \quad M \leftarrow a M - (a - b) P (M^\top P)^\top

    It needs gradients that are already synchronised, as one process, FSDP and plain DDP have them.

    DTensor parameters (FSDP2, tensor parallel, both, HSDP) need no arguments: rows and columns are read off their
    placements, and the step is the one that a single process would take, to rounding.

    Args:
        params: parameters or groups; :func:`orthdion.param_groups` makes good ones. Group keys are this constructor's
            keywords and ``algorithm`` ("dion" for matrices, "adamw", "lion"), ``flatten`` (a 3-D convolution weight
            is one matrix) and ``row_blocks`` (a fused QKV weight has 3).
        replicate_mesh: the ranks that hold copies with gradients of their own, whose P and R are averaged in place of
            gradients: what :func:`orthdion.decouple` returns for a DDP model, a one-dimensional DeviceMesh, or a
            ProcessGroup. None: gradients arrive synchronised, or there is one process.
        outer_shard_mesh, inner_shard_mesh: checked against the parameters' own meshes. None: those are believed.
        replicate_mesh_grad_sync: False says that gradients over ``replicate_mesh`` arrive synchronised after all.
        rank_fraction: r over min(m, n), in (0, 1]. None: 1/4.
        rank_multiple_of: r is rounded up to a multiple of this.
        lr: η, the same for all widths; for AdamW and Lion groups the plain learning rate. A tensor is read at each
        step.
        mu: μ, the momentum.
        betas: β₁, β₂ of AdamW and Lion groups.
        weight_decay: λ, decoupled; multiplied by the unscaled η.
        epsilon: AdamW's ε, and the relative guard of ``right_factor="column"``.
        right_factor: "qr" (this paper's), "column" (Dion's), "polar" (the exact rank-r polar step). None: "qr", and
            "polar" with a tail.
        feedback: "orth-dion" (μ, 0), "dion" (1, μ), "pure" (1, 0), "momentum" (μ, μ), or the two numbers (a, b) in
            [0, 1]. None: "orth-dion"; "momentum" with a linear tail; (μ, 0.7) with a normalized one.
        tail: what becomes of the residual: "feedback" (kept for later steps), "linear", "normalized".
        tail_scale: c, the root mean square of the tail's singular values; near 2 is good.
        nesterov: look ahead, B = μM + G. None: only with a tail.
        maximize: ascend.
        seed: of the starting Q; torch's global generators are never used.
        momentum_dtype, q_dtype: of the states; None is the parameter's. Factorisations are at least float32 always.
        compute_dtype: "bfloat16" rounds the operands of float32 products (sums and factorisations are not touched):
            faster where the processor multiplies bfloat16. "tf32" lets a GPU round them to TF32 (the reference backend
            does so anywhere, the Rust core has no use for it). None: neither, whatever torch's own settings say.
        reduce_dtype: rounds P, R and averaged gradients on the wire, torch.bfloat16 say. None: not.
        backend: "auto", "rust" (CPU), "cupy" (CUDA) or "reference" (any device).
        diagnostics: collect :func:`orthdion.diagnostics.last_step`'s figures.

    Raises:
        ValueError: a hyperparameter out of range, an unknown group key, a vector in a low-rank group, a tail where only
            factors are averaged, meshes that do not fit the parameters.
        NotImplementedError: a placement that cannot be handled.
        TypeError: a parameter that is not real floating-point, or an argument of the wrong kind.

    Example:
        >>> optimizer = orthdion.OrthDion(orthdion.param_groups(model), lr=0.01, tail="normalized")
        >>> loss.backward()
        >>> optimizer.step()
    """

    _published = ("qr", "orth-dion")
    _rank_fraction = 0.25
