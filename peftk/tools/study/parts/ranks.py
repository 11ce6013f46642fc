TITLE="ranks"
