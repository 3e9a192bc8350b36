package config

import (
	"cmp"
	"fmt"
	"os"
	"strings"
)

// credentialsBytesMax is far above any credentials file and far below what reading a device would give.
const credentialsBytesMax = 1 << 20

// Credentials are the keys of an S3 account.
type Credentials struct {
	AccessKeyID, SecretAccessKey, SessionToken Secret
}

// Credentials returns the keys that the configuration gives, itself or in the credentials file, which
// is read anew by each call. They are empty when it gives none: then the SDK's own chain is asked, for the
// profile if there is one.
func (s S3) Credentials() (Credentials, error) {
	if s.CredentialsFile == "" || s.ConfigFile != "" {
		return Credentials{s.AccessKeyID, s.SecretAccessKey, s.SessionToken}, nil
	}
	if st, err := os.Stat(s.CredentialsFile); err != nil {
		return Credentials{}, fmt.Errorf("credentials file: %w", err)
	} else if !st.Mode().IsRegular() || st.Size() > credentialsBytesMax {
		return Credentials{}, fmt.Errorf("credentials file %s: not a file of at most %d bytes", s.CredentialsFile, credentialsBytesMax)
	}
	text, err := os.ReadFile(s.CredentialsFile)
	if err != nil {
		return Credentials{}, fmt.Errorf("credentials file: %w", err)
	}
	profile := cmp.Or(s.Profile, "default")
	keys := profileKeys(string(text), profile)
	c := Credentials{keys["aws_access_key_id"], keys["aws_secret_access_key"], keys["aws_session_token"]}
	if c.AccessKeyID == "" || c.SecretAccessKey == "" {
		return Credentials{}, fmt.Errorf("credentials file %s: no aws_access_key_id and aws_secret_access_key in [%s]", s.CredentialsFile, profile)
	}
	return c, nil
}

// profileKeys reads one section of a file like ~/.aws/credentials.
func profileKeys(text, profile string) map[string]Secret {
	keys, in := map[string]Secret{}, false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		if line[0] == '[' {
			in = strings.TrimSpace(strings.Trim(line, "[]")) == profile
			continue
		}
		if name, value, ok := strings.Cut(line, "="); ok && in {
			keys[strings.ToLower(strings.TrimSpace(name))] = Secret(strings.TrimSpace(value))
		}
	}
	return keys
}
