"""Measuring tools: ours beside its peers, the input pipeline, and where the time of a step goes.

Nothing in `vit_jax/` or `configs/` imports this package. Its commands are in scripts/:

    benchmark.py          training steps and inference   steps.py, steps_tables.py, largest.py
    benchmark_data.py     the input pipeline             input_pipeline.py
    benchmark_export.py   ONNX graphs                    onnx_files.py
    profile_step.py       the parts of one step          trace.py

and `python -m benchmarks.NAME`, of which flowers trains for accuracy, not for speed: runs in
flowers_rows.py, their records in results/, tables in flowers_tables.py.

How they measure: every contestant gets ready and waits; each round times all of them once, in
rotated order, so that what disturbs one disturbs all (`turns.take_turns`). Each lives in its own
process (`turns.Child`), which runs one of

    jax_workload.py     ours, the original release's way, a matrix product
    torch_workload.py   timm, transformers, torchvision, a matrix product
    input_stages.py     our input pipeline, torchvision's, tf.data

`contestants.py` lists those of benchmark.py. `record.py` describes hardware and versions, writes
and reads result files and puts tables into documents, for all commands alike. Results that
documents show are in results/; docs/performance.md explains them. parity.py, torch_reference.py and
torch_libraries.py are for scripts/check_parity.py.
"""
