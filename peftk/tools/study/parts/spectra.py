TITLE="spectra"
