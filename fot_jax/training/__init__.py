"""What training needs beside the model and the data."""
