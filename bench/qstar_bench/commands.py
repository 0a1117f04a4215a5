"""Name the commands of `qstar bench` and `qstar memory`: module and one line of what each measures."""

BENCH = {
    "attention": (
        "qstar_bench.attention.attention_command",
        "time and memory of thought attention beside causal, dense, flex and flash attention",
    ),
    "data": ("qstar_bench.data_command", "tokens per second and memory of the loader of a streamed data set"),
    "generate": ("qstar_bench.generation_command", "tokens per second of every way to generate"),
    "gpu": ("qstar_bench.gpu_command", "GPU tests and benchmarks in ten minutes; `make gpu` runs it"),
    "kernels": (
        "qstar_bench.kernels.kernel_table",
        "registers, shared memory and tensor-core instructions of the compiled Triton kernels",
    ),
    "report": ("qstar_bench.report.report_command", "one HTML page of recorded runs, with plots"),
    "scaling": (
        "qstar_bench.training_step.scaling_command",
        "a training step over thought length, thoughts and thinking positions",
    ),
    "step": (
        "qstar_bench.training_step.step_command",
        "time and memory of a training step beside the published way and plain training",
    ),
}
MEMORY = {
    "plan": (
        "qstar_bench.memory.plan_command",
        "memory that a training step needs, and what fits on a card; needs no GPU and no weights",
    ),
    "profile": ("qstar_bench.memory.profile_command", "memory of a real training step beside its plan"),
}
