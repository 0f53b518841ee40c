"""The work around the model, one package a stage: `python -m recipes.<stage>.<verb> --config FILE`."""
