const report = JSON.parse(document.getElementById("data").textContent);
setUpTable();
if (report.saes.length) setUpPareto(report.saes);
setUpCurves(report.saes, report.curves);
setUpDensities(report.saes);
if (report.features) setUpBrowser(report.saes, report.features);
