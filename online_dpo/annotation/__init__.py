"""People as judges: what they are asked, what they answered, and the page where they do."""
