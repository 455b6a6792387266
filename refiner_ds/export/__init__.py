"""A run's weights as timm and the Hugging Face Hub read them: ``python -m refiner_ds.export RUN``.

<run>/export/
  model.safetensors   fp32 weights and running statistics
  config.json         architecture, its arguments, preprocessing, class names in the order of the outputs
  README.md           model card: recipe, figures of this run, licence, how to load
  model.onnx          with --onnx
"""
