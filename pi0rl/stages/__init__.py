"""The stages of an experiment, one module each with a ``run(experiment)``, from files to files.

The CLI calls them, ``dvc.yaml`` names the CLI commands, the Prefect flow runs those DVC stages. What a stage leaves in
its folder is decided by params and seed alone, but for ``timing.*``, which DVC ignores. One module each, so that DVC
runs again only the stages whose code has changed.
"""
