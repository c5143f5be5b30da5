"""What is wrong with data and with foreign weights, found before anything is trained on them."""
