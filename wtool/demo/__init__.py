"""What `wtool demo` needs: small trained checkpoints (`models/`, made by examples/make_demo.py) and texts."""
