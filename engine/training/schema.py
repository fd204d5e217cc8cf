"""The configuration groups of a training run, typed, under the names of the official implementation.

What such a name means here, and which ones are accepted without effect, says `engine.training.unused`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class AdamW:
    """The outer optimizer: AdamW, linear warm-up to `lr`, cosine decay to `end_lr` (arXiv 2512.23675)."""

    optimizer_type: str = "adamw"
    init_lr: float = 0.0
    end_lr: float = 1e-5
    lr: float = 0.01
    lr_warmup_steps: int = 2000
    lr_decay_steps: int = 500000
    """Outer step at which `end_lr` is reached, warm-up included."""
    b1: float = 0.9
    b2: float = 0.95
    clip_gradient: float = 1.0
    """Bound on the global norm of the gradient."""
    weight_decay: float = 0.1
    bf16_momentum: bool = False
    emb_wd: bool = True
    """Whether the embedding decays too."""


@dataclass
class SGD:
    """The inner optimizer: SGD with a bound on the gradient's global norm (0: none)."""

    optimizer_type: str = "sgd"
    lr: float = 0.01
    clip_gradient: float = 0.0
    init_lr: float | None = None
    end_lr: float | None = None
    lr_warmup_steps: int | None = None
    lr_decay_steps: int | None = None
    b1: float | None = None
    b2: float | None = None
    weight_decay: float | None = None
    bf16_momentum: bool | None = None


@dataclass
class Training:
    """The run: its data, its steps, its optimizers, where it writes and what it starts from."""

    exp_name: str = MISSING
    exp_folder: str = "demo"
    exp_dir: str = "./experiments"
    """Logs go to exp_dir/exp_folder/exp_name."""
    checkpoint_path: str = "./checkpoints"
    """Checkpoints go to checkpoint_path/exp_folder/exp_name."""
    resume_exp_name: str = ""
    """The experiment of the same folder to start from, by `load_part`."""
    resume_step: int | None = None
    """None: its latest checkpoint."""
    load_part: str = "none"
    """none, params or all (the optimizer and the place in the data too)."""
    eval_mode: bool = False
    """Evaluate only."""
    train_mode: str = "pretrain"
    """pretrain: a plain Transformer. meta: TTT-E2E, through the inner loop."""
    model_seed: int = 0
    data_seed: int = 0
    total_steps: int = 2500
    break_step: int = -1
    """The last step before training stops early; -1: none."""
    save_milestone_freq: int = 2500
    """Steps between checkpoints; 0: only the last step's."""
    dataset_name: str = MISSING
    """A key of deploy_paths.data, or stdlib: the sources of Python's standard library, as bytes."""
    dataset_path: str | None = None
    """None: deploy_paths.data.<dataset_name>."""
    data_split: str = "train"
    eval_split: str = "val"
    dummy_dataset: bool = False
    tokenizer: str | None = None
    """Of text data: bytes, llama3 or the path of a tokenizer.model; None: by the vocabulary."""
    seq_length: int = 1024
    global_batch_size: int = 8
    """Sequences in an outer step, over all processes and accumulation steps."""
    accum_steps: int = 1
    eval_batch_size: int = 8
    """Sequences that are evaluated at a time, at most; never more than are trained on at a time."""
    optimizer_outer: AdamW = field(default_factory=AdamW)
    optimizer_inner: SGD | None = field(default_factory=SGD)
    ilr_init: float = 1.0
    """Inner learning rate at which its warm-up over `ilr_warmup_steps` outer steps starts."""
    ilr_warmup_steps: int = 0
    truncate_steps: int | None = None
    """Through at most so many inner steps goes the gradient; None: through all."""
    method: str = "auto"
    """How the gradient gets at the fast weights of every step: auto, rollback, snapshots or graph."""
    checkpoint_blocks: bool | None = None
    """Whether blocks are computed again in the backward pass; None: where it pays."""
    device: str | None = None
    """None: cuda where there is one, else cpu."""
    ttt_backend: str | None = None
    """The kernels' backend; None: the best that can run."""
    log_wandb: bool | None = None
    """Log to Weights & Biases; None: if wandb_project is given."""
    wandb_entity: str | None = None
    wandb_project: str | None = None
    wandb_key: str | None = None
    """None: what `wandb login` or WANDB_API_KEY left; unlike those, a command line is seen by others."""
    wandb_mode: str = "online"
    """online, offline or disabled."""
    spec_outer: list[str] = field(default_factory=lambda: ["**"])
    spec_inner: list[str] = field(default_factory=lambda: ["**"])
    tokenizer_name: str = "meta-llama/Llama-2-7b-hf"
    loader_workers: int = 32
    inner_remat_freq: int = 1
    n_data_parallel: int | None = None
    n_state_parallel: int = 1


@dataclass
class Model:
    """The shapes of the model, what it computes in, and how it attends."""

    name: str = "unnamed"
    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    seq_modeling_block: str = "self_attention"
    """self_attention: every token sees all before it. SWA: the last `sliding_window_size`."""
    mini_batch_size: int = 1024
    """Tokens per inner step; not used by train_mode=pretrain."""
    sliding_window_size: int = 1024
    prime: bool = False
    """Whether the last `suffix_len` blocks have fast MLPs."""
    suffix_len: int = 0
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    compute_dtype: str = "bf16"
    param_dtype: str = "fp32"
    state_dtype: str = "fp32"
    seq_len: int = 131072
    output_size: int = 32000
    feed_forward_prime: str = "swiglu"
    qk_norm: bool = True
    pre_norm: bool = True
    post_norm: bool = True
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    remat_block: str = ""
    remat_block_bwd: str = ""
    remat_prefix_block: str = "nothing_saveable"
    remat_attention: str = ""
    remat_attention_bwd: str = ""
    remat_mlp: str = ""
    remat_mlp_bwd: str = ""
    remat_rms: str = ""
    remat_rms_bwd: str = ""
    remat_multiple_gd: str = ""
    unroll_block_scan: bool = False
    unroll_inner_scan: bool = False
    force_flash: bool = False


@dataclass
class Backend:
    """How the official implementation sets up JAX; of no meaning here."""

    backend: str | None = None
    distributed: bool = False
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: str | None = None
    num_devices: int | None = None
    compilation_cache_dir: str | None = "/tmp/jax_cache"


@dataclass
class Checkpoint:
    """Folders of checkpoints."""

    checkpoint_dir: str = "${deploy_paths.checkpoint}/${training.exp_folder}/${training.exp_name}"
    resume_checkpoint_dir: str = (
        "${deploy_paths.checkpoint}/${training.exp_folder}/${training.resume_exp_name}"
    )
    float_dtype: str = "bf16"
    save_optimizer_state: bool = True


@dataclass
class DeployPaths:
    """Where data sets, by name, and checkpoints lie on this machine."""

    data: dict[str, str | None] = field(default_factory=lambda: {"dclm_filter_8k": None, "books3": None})
    checkpoint: str = "${training.checkpoint_path}"


@dataclass
class Config:
    """All groups."""

    training: Training = field(default_factory=Training)
    model: Model = field(default_factory=Model)
    backend: Backend = field(default_factory=Backend)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    deploy_paths: DeployPaths = field(default_factory=DeployPaths)
