// The modules of the page.

import "./address.js";
import "./problems.js";
import "./controls.js";
import "./marks.js";
import "./keyboard.js";
import "./dialog.js";
import "./drop.js";
import "./cutoff.js";
import "./share.js";
