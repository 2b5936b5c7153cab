"""Show what was measured and decided: model card, tables, pictures, inspection page, benchmark and plan as text.

Entry points: `model_card.build_model_card`, `tables.results_table`, `plan_text.show_plan` and `plan_text.diff_plans`,
`inspection_page.build_page`, and `benchmark.benchmark_models`.

This folder reads values and files; it must not change a model, train, upload, or know the command line.
"""
