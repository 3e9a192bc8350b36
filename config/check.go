package config

import (
	"fmt"
	"maps"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// check notes what is wrong with the values together; each alone was checked by the walker.
func (c *Config) check(col *collector) {
	c.checkData(col)
	c.checkListen(col)
	if !col.bad("tier.size") && c.Tier.Size != 0 && c.Tier.Size < TierSizeMin {
		col.add(Problem{Key: "tier.size", Value: c.Tier.Size.String(), Msg: fmt.Sprintf("%v is less than %v", c.Tier.Size, TierSizeMin)})
	}
	if !col.bad("tier.ram") && c.Tier.RAM < RAMMin {
		col.add(Problem{Key: "tier.ram", Value: c.Tier.RAM.String(), Msg: fmt.Sprintf("%v is less than %v", c.Tier.RAM, RAMMin)})
	}
	checkAtLeast(col, "shutdown_timeout", c.ShutdownTimeout, time.Second)

	if len(c.Pools) == 0 {
		col.addMissing("pools", "no pool is configured")
	}
	disks := map[string]string{} // name → key of the disk that has it
	for _, name := range slices.Sorted(maps.Keys(c.Pools)) {
		c.checkPool(col, name, disks)
	}
	c.checkRules(col)
	c.checkDirs(col)
	c.checkPrefixes(col)
}

// addMissing notes that a required key is not there, unless what is there has a problem already.
func (c *collector) addMissing(key, msg string) {
	if !c.bad(key) {
		c.add(Problem{Key: key, Msg: msg})
	}
}

func checkAtLeast(col *collector, key string, d, least time.Duration) {
	if !col.bad(key) && d < least {
		col.add(Problem{Key: key, Value: d.String(), Msg: fmt.Sprintf("%v is less than %v", d, least)})
	}
}

func (c *Config) checkData(col *collector) {
	switch {
	case c.Data == "":
		col.addMissing("data", "the data directory is missing")
	case !filepath.IsAbs(c.Data):
		col.add(Problem{Key: "data", Value: c.Data, Msg: fmt.Sprintf("%q must be an absolute path", c.Data)})
	default:
		if err := checkSocketPath(c.AdminSocket()); err != nil {
			col.add(Problem{Key: "data", Value: c.Data, Msg: err.Error(), Hint: "use a shorter data directory"})
		}
	}
}

func (c *Config) checkListen(col *collector) {
	seen := map[string]string{"unix://" + c.AdminSocket(): "the admin socket", "unix://" + c.HandoverSocket(): "the hand-over socket"}
	for i, l := range c.Listen.NBD {
		key := fmt.Sprintf("listen.nbd[%d].address", i)
		if col.bad(key) || col.bad("data") && col.lines[key] == 0 {
			continue // or the default below a bad data directory
		}
		if l.Address == "" {
			col.add(Problem{Key: key, Msg: "the address is missing"})
		} else if err := checkAddress(l.Address); err != nil {
			col.add(Problem{Key: key, Value: l.Address, Msg: fmt.Sprintf("%q: %v", l.Address, err)})
		} else if other := seen[l.Address]; other != "" {
			col.add(Problem{Key: key, Value: l.Address, Msg: fmt.Sprintf("%q is that of %s too", l.Address, other)})
		}
		seen[l.Address] = key
		checkTLS(col, fmt.Sprintf("listen.nbd[%d]", i), l)
	}
	if m := c.Listen.Metrics; m != "" {
		if err := checkHostPort(m); err != nil {
			col.add(Problem{Key: "listen.metrics", Value: m, Msg: fmt.Sprintf("%q: %v", m, err)})
		}
	}
}

func (c *Config) checkPool(col *collector, name string, disks map[string]string) {
	p, at := c.Pools[name], "pools."+name
	checkAtLeast(col, at+".max_dirty_age", p.MaxDirtyAge, maxDirtyAgeMin)
	if key := at + ".max_exposure"; p.MaxExposure != 0 && p.MaxExposure < maxExposureMin && !col.bad(key) {
		col.add(Problem{Key: key, Value: p.MaxExposure.String(), Msg: fmt.Sprintf("%v is less than %v", p.MaxExposure, maxExposureMin)})
	}
	if p.DeleteGrace != 0 {
		checkAtLeast(col, at+".delete_grace", p.DeleteGrace, time.Second)
	}
	if p.UndeleteWindow != 0 {
		checkAtLeast(col, at+".undelete_window", p.UndeleteWindow, time.Second)
	}
	if p.MaxExposureAge != 0 && !col.bad(at+".max_dirty_age") {
		checkAtLeast(col, at+".max_exposure_age", p.MaxExposureAge, 2*p.MaxDirtyAge)
	}
	if p.ScrubPeriod != 0 {
		checkAtLeast(col, at+".scrub_period", p.ScrubPeriod, scrubPeriodMin)
	}
	if key := at + ".scrub_rate"; p.ScrubRate < scrubRateMin && !col.bad(key) {
		col.add(Problem{Key: key, Value: p.ScrubRate.String(), Msg: fmt.Sprintf("%v a second is less than %v", p.ScrubRate, scrubRateMin)})
	}
	if key := at + ".repair_rate"; p.RepairRate > 0 && p.RepairRate < scrubRateMin && !col.bad(key) {
		col.add(Problem{Key: key, Value: p.RepairRate.String(), Msg: fmt.Sprintf("%v a second is less than %v", p.RepairRate, scrubRateMin)})
	}
	if p.Beat != 0 {
		checkAtLeast(col, at+".beat", p.Beat, beatMin)
	}
	if key, least := at+".watch", max(2*p.Beat, beatMin); p.Watch != 0 && p.Watch < least && !col.bad(at+".beat") && !col.bad(key) {
		msg := fmt.Sprintf("%v is less than %v", p.Watch, least)
		if least == 2*p.Beat {
			msg += fmt.Sprintf(", two beats of %v", p.Beat)
		}
		col.add(Problem{Key: key, Value: p.Watch.String(), Msg: msg})
	}
	if len(p.Targets) == 0 {
		col.addMissing(at+".targets", "the pool has no targets")
	} else if p.dataTargets() == 0 {
		col.addMissing(at+".targets", "all targets are witnesses, which hold no data")
	}
	names := map[string]bool{}
	for i, t := range p.Targets {
		key := fmt.Sprintf("%s.targets[%d]", at, i)
		checkName(col, key+".name", t.Name)
		if t.Name != "" && names[t.Name] {
			col.add(Problem{Key: key + ".name", Value: t.Name, Msg: fmt.Sprintf("a target %q is there already", t.Name)})
		}
		names[t.Name] = true
		checkTarget(col, key, t)
		checkLimits(col, key+".limits", t.Limits)
	}
	checkStripe(col, at, p)
	for i, d := range p.Disks {
		key := fmt.Sprintf("%s.disks[%d]", at, i)
		checkName(col, key+".name", d.Name)
		if other := disks[d.Name]; d.Name != "" && other != "" {
			col.add(Problem{Key: key + ".name", Value: d.Name, Msg: fmt.Sprintf("disk %q is in %s already; names are unique per gateway", d.Name, other)})
		}
		disks[d.Name] = key
		if d.Size == 0 {
			col.addMissing(key+".size", "the size is missing")
		} else if err := CheckDiskSize(d.Size); err != nil {
			col.add(Problem{Key: key + ".size", Value: d.Size.String(), Msg: err.Error()})
		}
	}
}

func checkName(col *collector, key, name string) {
	if name == "" {
		col.addMissing(key, "the name is missing")
	} else if err := CheckDiskName(name); err != nil {
		col.add(Problem{Key: key, Value: name, Msg: err.Error()})
	}
}

// Survives is how many lost targets the pool survives: reading needs all but m shards of every
// stripe, publishing a majority of the targets, witnesses included.
func (p Pool) Survives() int { return min(p.lossesRead(), (len(p.Targets)-1)/2) }

// shardsPerTarget is the most shards of one stripe that a target holds.
func (p Pool) shardsPerTarget() int {
	n := p.dataTargets()
	return (p.Stripe.Data + p.Stripe.Parity + n - 1) / n
}

// lossesRead is how many lost targets leave every stripe readable.
func (p Pool) lossesRead() int { return p.Stripe.Parity / p.shardsPerTarget() }

// checkStripe refuses a pool that claims to survive more than it does.
func checkStripe(col *collector, at string, p Pool) {
	key := at + ".stripe"
	if p.Stripe.Data == 0 {
		col.addMissing(key+".data", "the number of data shards is missing")
	}
	n, data, k, m := len(p.Targets), p.dataTargets(), p.Stripe.Data, p.Stripe.Parity
	if data == 0 || m == 0 || col.bad(key) || col.bad(at+".targets") {
		return // without parity nothing is claimed
	}
	if each := p.shardsPerTarget(); each > m {
		col.add(Problem{Key: key, Value: p.Stripe.String(), Msg: fmt.Sprintf(
			"%v is %d shards; with %s one holds %d of them, and losing it is more than parity %d rebuilds",
			p.Stripe, k+m, p.CountTargets(), each, m),
			Hint: p.needsTargets()})
		return
	}
	if claim, publish := p.lossesRead(), (n-1)/2; claim > publish {
		col.add(Problem{Key: key, Value: p.Stripe.String(), Msg: fmt.Sprintf(
			"%v on %s would survive the loss of %d, but publishing needs a majority, %d of %d, and survives the loss of %d",
			p.Stripe, p.CountTargets(), claim, n/2+1, n, publish),
			Hint: fmt.Sprintf("use %d targets or more, of which those you add may be \"witness: true\", or less parity", 2*claim+1)})
	}
}

// needsTargets says how many targets a stripe with parity needs: so many that none holds more shards than there is
// parity, and three for the root.
func (p Pool) needsTargets() string {
	data := (p.Stripe.Data + 2*p.Stripe.Parity - 1) / p.Stripe.Parity
	switch {
	case data < 3:
		return fmt.Sprintf("%v needs 3 targets, of which one may be \"witness: true\"", p.Stripe)
	case p.dataTargets() == len(p.Targets):
		return fmt.Sprintf("%v needs %d targets", p.Stripe, data)
	}
	return fmt.Sprintf("%v needs %d targets that are no witnesses", p.Stripe, data)
}

// CountTargets says how many targets there are: "2 targets and 1 witness".
func (p Pool) CountTargets() string {
	data := p.dataTargets()
	switch w := len(p.Targets) - data; w {
	case 0:
		return count(data, "target")
	case 1:
		return count(data, "target") + " and 1 witness"
	default:
		return fmt.Sprintf("%s and %d witnesses", count(data, "target"), w)
	}
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func checkTarget(col *collector, key string, t Target) {
	kinds := 0
	for _, there := range []bool{t.S3 != nil, t.Azure != nil, t.Local != nil} {
		if there {
			kinds++
		}
	}
	switch {
	case kinds > 1:
		col.add(Problem{Key: key, Msg: "names several stores; a target is one of s3, azure and local"})
	case t.S3 != nil:
		checkS3(col, key+".s3", *t.S3)
	case t.Azure != nil:
		checkAzure(col, key+".azure", *t.Azure)
	case t.Local != nil:
		checkAbs(col, key+".local.dir", t.Local.Dir)
	case !col.bad(key):
		col.add(Problem{Key: key, Msg: "names no store; it needs s3, azure or local"})
	}
}

func checkAbs(col *collector, key, path string) {
	if path == "" {
		col.addMissing(key, "the path is missing")
	} else if !filepath.IsAbs(path) {
		col.add(Problem{Key: key, Value: path, Msg: fmt.Sprintf("%q must be an absolute path", path)})
	}
}

// checkPlace checks what all stores on the network have.
func checkPlace(col *collector, key, endpoint, prefix, caFile string) {
	checkEndpoint(col, key+".endpoint", endpoint)
	if err := checkPrefix(prefix); err != nil {
		col.add(Problem{Key: key + ".prefix", Value: prefix, Msg: err.Error()})
	}
	if caFile != "" {
		checkAbs(col, key+".ca_file", caFile)
	}
}

func checkEndpoint(col *collector, key, endpoint string) {
	if u, err := url.Parse(endpoint); endpoint != "" && (err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "") {
		col.add(Problem{Key: key, Msg: "must be http://host[:port] or https://host[:port]"}) // without the value: it may hold a secret
	}
}

// checkPrefix holds a prefix to the rules of object keys.
func checkPrefix(p string) error {
	if p == "" {
		return nil
	}
	if len(p) > 256 {
		return fmt.Errorf("the prefix has %d bytes, at most 256 are allowed", len(p))
	}
	for part := range strings.SplitSeq(p, "/") {
		odd := strings.IndexFunc(part, func(r rune) bool {
			return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("._-", r))
		})
		if part == "" || part == "." || part == ".." || odd >= 0 {
			return fmt.Errorf("%q: names of a-z A-Z 0-9 . _ - with one / between them, none at the ends", p)
		}
	}
	return nil
}

// checkDirs refuses directories that share their files: a tier and targets need each their own.
func (c *Config) checkDirs(col *collector) {
	type dir struct{ key, path string }
	var dirs []dir
	if filepath.IsAbs(c.Tier.Dir) {
		dirs = append(dirs, dir{"tier.dir", filepath.Clean(c.Tier.Dir)})
	} else if !col.bad("data") || col.lines["tier.dir"] != 0 { // else it is the default below a bad directory
		checkAbs(col, "tier.dir", c.Tier.Dir)
	}
	for _, name := range slices.Sorted(maps.Keys(c.Pools)) {
		for i, t := range c.Pools[name].Targets {
			if t.Local != nil && filepath.IsAbs(t.Local.Dir) {
				dirs = append(dirs, dir{fmt.Sprintf("pools.%s.targets[%d].local.dir", name, i), filepath.Clean(t.Local.Dir)})
			}
		}
	}
	for i, d := range dirs {
		if filepath.IsAbs(c.Data) && below(filepath.Clean(c.Data), d.path) {
			col.add(Problem{Key: d.key, Value: d.path, Msg: fmt.Sprintf("%s holds the data directory %s", d.path, c.Data)})
		}
		for _, e := range dirs[:i] {
			if below(d.path, e.path) || below(e.path, d.path) {
				col.add(Problem{Key: d.key, Value: d.path, Msg: fmt.Sprintf("%s shares files with %s (%s)", d.path, e.key, e.path)})
			}
		}
	}
}

// checkPrefixes refuses targets on the network whose objects would mix.
func (c *Config) checkPrefixes(col *collector) {
	type place struct{ key, bucket, at, path string }
	var places []place
	for _, name := range slices.Sorted(maps.Keys(c.Pools)) {
		for i, t := range c.Pools[name].Targets {
			var p place
			switch key := fmt.Sprintf("pools.%s.targets[%d]", name, i); {
			case t.S3 != nil:
				p = place{key + ".s3", "bucket " + t.S3.Bucket, strings.TrimRight(t.S3.Endpoint, "/"), "/" + t.S3.Prefix}
			case t.Azure != nil:
				p = place{key + ".azure", "container " + t.Azure.Container, strings.TrimRight(t.Azure.Endpoint, "/") + "/" + t.Azure.Account, "/" + t.Azure.Prefix}
			default:
				continue
			}
			for _, q := range places {
				if p.bucket == q.bucket && p.at == q.at && (below(p.path, q.path) || below(q.path, p.path)) {
					col.add(Problem{Key: p.key, Msg: fmt.Sprintf("%s and prefix %q share objects with %s, prefix %q", p.bucket, p.path[1:], q.key, q.path[1:])})
				}
			}
			places = append(places, p)
		}
	}
}

// below says whether the clean path p is dir or lies in it.
func below(p, dir string) bool {
	return p == dir || dir == "/" || strings.HasPrefix(p, dir+"/")
}
