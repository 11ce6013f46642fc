TITLE="placement"
