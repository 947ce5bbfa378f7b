"""Reading model files and example inputs safely, and making the Program from them."""
