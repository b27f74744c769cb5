{{- define "flannel.image" -}}
{{ .Values.flannel.image.repository }}:{{ .Values.flannel.image.tag }}
{{- end -}}

{{- define "flannel.cniImage" -}}
{{- $own := .Values.flannel.image -}}
{{- with .Values.flannel.flannel_cni.image -}}
{{ .repository | default $own.repository }}:{{ .tag | default $own.tag }}
{{- end -}}
{{- end -}}

{{- define "flannel.policyNotice" -}}
{{- if and .Values.networkPolicyNotice (not .Values.netpol.enabled) }}true{{ end -}}
{{- end -}}

{{- define "flannel.installer" -}}
privileged: false
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: ["ALL"]
  # Some installers give the host's directories to another user than root.
  add: ["DAC_OVERRIDE"]
{{- end -}}

{{/* The network configuration as an object, so that it is valid JSON whatever the values are. */}}
{{- define "flannel.netConf" -}}
{{- $f := .Values.flannel -}}
{{- $backend := dict "Type" $f.backend -}}
{{- if eq $f.backend "vxlan" -}}
{{- with $f.backendPort }}{{ $_ := set $backend "Port" (int .) }}{{ end -}}
{{- with $f.vni }}{{ $_ := set $backend "VNI" (int .) }}{{ end -}}
{{- with $f.GBP }}{{ $_ := set $backend "GBP" . }}{{ end -}}
{{- with $f.directRouting }}{{ $_ := set $backend "DirectRouting" . }}{{ end -}}
{{- with $f.mtu }}{{ $_ := set $backend "MTU" (int .) }}{{ end -}}
{{- else if eq $f.backend "wireguard" -}}
{{- with $f.backendPort }}{{ $_ := set $backend "ListenPort" (int .) }}{{ end -}}
{{- with $f.backendPortv6 }}{{ $_ := set $backend "ListenPortV6" (int .) }}{{ end -}}
{{- with $f.psk }}{{ $_ := set $backend "PSK" (toString .) }}{{ end -}}
{{- with $f.mtu }}{{ $_ := set $backend "MTU" (int .) }}{{ end -}}
{{- with $f.tunnelMode }}{{ $_ := set $backend "Mode" . }}{{ end -}}
{{- with $f.keepaliveInterval }}{{ $_ := set $backend "PersistentKeepaliveInterval" (int .) }}{{ end -}}
{{- else if eq $f.backend "udp" -}}
{{- with $f.backendPort }}{{ $_ := set $backend "Port" (int .) }}{{ end -}}
{{- end -}}
{{- $conf := dict "Backend" $backend "EnableNFTables" $f.enableNFTables -}}
{{- if .Values.podCidr -}}
{{- $_ := set $conf "Network" .Values.podCidr -}}
{{- else -}}
{{- $_ := set $conf "EnableIPv4" false -}}
{{- end -}}
{{- if .Values.podCidrv6 -}}
{{- $_ := set $conf "IPv6Network" .Values.podCidrv6 -}}
{{- $_ := set $conf "EnableIPv6" true -}}
{{- end -}}
{{- $conf | toPrettyJson -}}
{{- end -}}
